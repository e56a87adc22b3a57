//! Runs the law of amounts; it is stated in `ledger-core/src/laws.rs`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| ledger_core::laws::amount(bytes));
