//! Is this a modulus that nobody can factor, and an exponent that signs anything?
//!
//! 2048 to 8192 bits, both odd, an exponent of 65537 or more (FIPS 186-5; with 1 every message signs itself). And not of the chips
//! with the weakness ROCA (CVE-2017-15361): their primes are powers of 65537 modulo a product of small primes, so the modulus is a
//! power of 65537 modulo each of these, which happens to an honest one once in a hundred million.
//!
//! It factors nothing: two keys that share a prime look fine here.
const FEWEST_BITS: usize = 2048;
const MOST_BITS: usize = 8192;
const LEAST_EXPONENT: u64 = 65_537;
const LONGEST_EXPONENT: usize = 4;

/// The primes that divide the product that the weak chips use, for every length of key.
const PRIMES: [u32; 38] = [
    3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79, 83, 89, 97, 101, 103, 107, 109,
    113, 127, 131, 137, 139, 149, 151, 157, 163, 167,
];

/// Both without leading zeros.
pub fn checked(modulus: &[u8], exponent: &[u8]) -> Result<(), &'static str> {
    let bits = modulus.first().map_or(0, |first| modulus.len() * 8 - first.leading_zeros() as usize);
    if bits < FEWEST_BITS {
        return Err("is shorter than 2048 bits");
    }
    if bits > MOST_BITS {
        return Err("is longer than 8192 bits");
    }
    if exponent.len() > LONGEST_EXPONENT {
        return Err("has an exponent longer than 32 bits");
    }
    let value = exponent.iter().fold(0, |value: u64, byte| value << 8 | u64::from(*byte));
    let is_odd = |number: &[u8]| number.last().is_some_and(|last| last & 1 == 1);
    if value < LEAST_EXPONENT || !is_odd(exponent) || !is_odd(modulus) {
        return Err("has a modulus or an exponent that is no RSA key's");
    }
    if PRIMES.iter().all(|prime| is_power_of_65537(remainder(modulus, *prime), *prime)) {
        return Err("comes from a chip whose keys can be computed (CVE-2017-15361)");
    }
    Ok(())
}

fn remainder(modulus: &[u8], prime: u32) -> u32 {
    modulus.iter().fold(0, |rest, byte| (rest << 8 | u32::from(*byte)) % prime)
}

fn is_power_of_65537(number: u32, prime: u32) -> bool {
    let mut power = 1;
    for _ in 0..prime {
        if power == number {
            return true;
        }
        power = power * (65_537 % prime) % prime;
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An odd number of so many bits; nobody factors it here.
    fn modulus(bits: usize) -> Vec<u8> {
        let mut found = vec![0xa7; bits.div_ceil(8)];
        if let Some(first) = found.first_mut() {
            *first = 1 << ((bits - 1) % 8);
        }
        found
    }

    #[test]
    fn sizes_and_exponents_have_bounds() {
        let usual = [1, 0, 1];
        for (bits, is_fine) in [(1024, false), (2047, false), (2048, true), (3072, true), (8192, true), (8193, false)] {
            assert_eq!(checked(&modulus(bits), &usual).is_ok(), is_fine, "{bits} bits");
        }
        let exponents: [(&[u8], bool); 7] = [
            (&[1], false),
            (&[3], false),
            (&[1, 0, 0], false),
            (&[], false),
            (&[1, 0, 1], true),
            (&[0xff, 0xff, 0xff, 0xff], true),
            (&[1, 0, 0, 0, 1], false),
        ];
        for (exponent, is_fine) in exponents {
            assert_eq!(checked(&modulus(2048), exponent).is_ok(), is_fine, "{exponent:?}");
        }
        let even = [modulus(2040), vec![2]].concat();
        assert!(checked(&even, &usual).is_err());
    }

    #[test]
    fn keys_of_the_weak_chips_are_known_by_their_remainders() {
        // 65537^128 has the form of their moduli; one bit more, and it hasn't.
        let mut power = vec![1_u8];
        for _ in 0..128 {
            let mut carry: u64 = 0;
            let mut next: Vec<u8> = Vec::new();
            for byte in &power {
                carry += u64::from(*byte) * 65_537;
                next.push((carry & 0xff) as u8);
                carry >>= 8;
            }
            while carry > 0 {
                next.push((carry & 0xff) as u8);
                carry >>= 8;
            }
            power = next;
        }
        power.reverse();
        assert_eq!(checked(&power, &[1, 0, 1]), Err("comes from a chip whose keys can be computed (CVE-2017-15361)"));
        let other = [power.as_slice(), &[1]].concat();
        assert_eq!(checked(&other, &[1, 0, 1]), Ok(()));
    }
}
