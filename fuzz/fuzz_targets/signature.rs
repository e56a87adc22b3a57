//! Runs the law of signatures; it is stated in `workflows/src/laws.rs`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| workflows::laws::signature(bytes));
