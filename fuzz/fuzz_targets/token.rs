//! Runs the law of tokens; it is stated in `api-contract/src/laws.rs`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| api_contract::laws::token(bytes));
