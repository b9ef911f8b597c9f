#![no_main]
libfuzzer_sys::fuzz_target!(|input: &[u8]| mesh_fuzz::http1_guard::check(input));
