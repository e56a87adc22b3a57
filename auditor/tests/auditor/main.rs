//! The auditor against logs that were broken on purpose. `story` makes a whole one; each file breaks it its own way.

#![expect(clippy::unwrap_used, reason = "clippy.toml excepts tests, but not their helpers")]

mod databases;
mod exports;
mod story;
mod views;
