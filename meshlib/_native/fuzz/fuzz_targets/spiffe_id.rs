#![no_main]
libfuzzer_sys::fuzz_target!(|text: &str| mesh_fuzz::spiffe_id::check(text));
