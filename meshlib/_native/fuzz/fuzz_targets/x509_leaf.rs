#![no_main]
libfuzzer_sys::fuzz_target!(|der: &[u8]| mesh_fuzz::x509_leaf::check(der));
