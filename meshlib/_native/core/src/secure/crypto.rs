//! Is this signature good, and what is the digest of that?
//!
//! The one place of the core that names a library of cryptography: `ring`, or `aws-lc-rs` under the feature `aws-lc`, which has the
//! same interface. Only public keys and asymmetric algorithms exist here, so that nothing can be taken for a shared secret.
//!
//! It does not choose keys and knows no JSON. Points are checked when a key is made, not when somebody's token is.
#[cfg(feature = "aws-lc")]
use aws_lc_rs::{digest, signature};
#[cfg(not(feature = "aws-lc"))]
use ring::{digest, signature};

#[cfg(not(any(feature = "ring", feature = "aws-lc")))]
compile_error!("mesh-core needs a library of cryptography: turn on the feature `ring` or `aws-lc`");

/// The algorithms of RFC 7518 and 8037 that have a public key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Algorithm {
    Rs256,
    Rs384,
    Rs512,
    Ps256,
    Ps384,
    Ps512,
    Es256,
    Es384,
    Es512,
    EdDsa,
}

/// `ring` can't do P-521.
const HAS_P521: bool = cfg!(feature = "aws-lc");

const NAMES: [(Algorithm, &str); 10] = [
    (Algorithm::Rs256, "RS256"),
    (Algorithm::Rs384, "RS384"),
    (Algorithm::Rs512, "RS512"),
    (Algorithm::Ps256, "PS256"),
    (Algorithm::Ps384, "PS384"),
    (Algorithm::Ps512, "PS512"),
    (Algorithm::Es256, "ES256"),
    (Algorithm::Es384, "ES384"),
    (Algorithm::Es512, "ES512"),
    (Algorithm::EdDsa, "EdDSA"),
];

impl Algorithm {
    /// By its exact name, if it is supported.
    pub fn named(name: &str) -> Option<Self> {
        Self::supported().find(|(_, known)| *known == name).map(|(algorithm, _)| algorithm)
    }

    pub fn supported() -> impl Iterator<Item = (Self, &'static str)> {
        NAMES.into_iter().filter(|(algorithm, _)| HAS_P521 || *algorithm != Algorithm::Es512)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Curve {
    P256,
    P384,
    P521,
}

impl Curve {
    pub fn named(name: &str) -> Option<Self> {
        match name {
            "P-256" => Some(Curve::P256),
            "P-384" => Some(Curve::P384),
            "P-521" if HAS_P521 => Some(Curve::P521),
            _ => None,
        }
    }

    /// Bytes of a coordinate.
    pub fn size(self) -> usize {
        match self {
            Curve::P256 => 32,
            Curve::P384 => 48,
            Curve::P521 => 66,
        }
    }
}

/// A public key whose form was checked.
#[derive(Debug)]
pub enum PublicKey {
    /// Modulus and exponent, without leading zeros.
    Rsa {
        modulus: Vec<u8>,
        exponent: Vec<u8>,
    },
    /// A point of the curve, uncompressed.
    Ec {
        curve: Curve,
        point: Vec<u8>,
    },
    Ed25519 {
        point: Vec<u8>,
    },
}

impl PublicKey {
    /// None: it is no point of the curve.
    pub fn on_curve(curve: Curve, x: &[u8], y: &[u8]) -> Option<Self> {
        let point = [&[4], x, y].concat();
        is_on_curve(curve, &point).then_some(PublicKey::Ec { curve, point })
    }

    pub fn fits(&self, algorithm: Algorithm) -> bool {
        use Algorithm::{EdDsa, Es256, Es384, Es512, Ps256, Ps384, Ps512, Rs256, Rs384, Rs512};
        match self {
            PublicKey::Rsa { .. } => matches!(algorithm, Rs256 | Rs384 | Rs512 | Ps256 | Ps384 | Ps512),
            PublicKey::Ec { curve: Curve::P256, .. } => algorithm == Es256,
            PublicKey::Ec { curve: Curve::P384, .. } => algorithm == Es384,
            PublicKey::Ec { curve: Curve::P521, .. } => algorithm == Es512,
            PublicKey::Ed25519 { .. } => algorithm == EdDsa,
        }
    }

    /// False also for an algorithm of another kind of key.
    pub fn verifies(&self, algorithm: Algorithm, message: &[u8], signed: &[u8]) -> bool {
        match self {
            PublicKey::Rsa { modulus, exponent } => padding(algorithm).is_some_and(|parameters| {
                let key = signature::RsaPublicKeyComponents { n: modulus.as_slice(), e: exponent.as_slice() };
                key.verify(parameters, message, signed).is_ok()
            }),
            PublicKey::Ec { point, .. } | PublicKey::Ed25519 { point } if self.fits(algorithm) => of_a_point(algorithm)
                .is_some_and(|how| signature::UnparsedPublicKey::new(how, point).verify(message, signed).is_ok()),
            _ => false,
        }
    }
}

pub fn sha256(bytes: &[u8]) -> [u8; 32] {
    let mut found = [0; 32];
    found.iter_mut().zip(digest::digest(&digest::SHA256, bytes).as_ref()).for_each(|(to, from)| *to = *from);
    found
}

fn padding(algorithm: Algorithm) -> Option<&'static signature::RsaParameters> {
    Some(match algorithm {
        Algorithm::Rs256 => &signature::RSA_PKCS1_2048_8192_SHA256,
        Algorithm::Rs384 => &signature::RSA_PKCS1_2048_8192_SHA384,
        Algorithm::Rs512 => &signature::RSA_PKCS1_2048_8192_SHA512,
        Algorithm::Ps256 => &signature::RSA_PSS_2048_8192_SHA256,
        Algorithm::Ps384 => &signature::RSA_PSS_2048_8192_SHA384,
        Algorithm::Ps512 => &signature::RSA_PSS_2048_8192_SHA512,
        _ => return None,
    })
}

fn of_a_point(algorithm: Algorithm) -> Option<&'static dyn signature::VerificationAlgorithm> {
    Some(match algorithm {
        Algorithm::Es256 => &signature::ECDSA_P256_SHA256_FIXED,
        Algorithm::Es384 => &signature::ECDSA_P384_SHA384_FIXED,
        #[cfg(feature = "aws-lc")]
        Algorithm::Es512 => &signature::ECDSA_P521_SHA512_FIXED,
        Algorithm::EdDsa => &signature::ED25519,
        _ => return None,
    })
}

/// `ring` checks a point where it is used, and agreeing on a key uses it. The key is thrown away, so chance has no say in the answer.
#[cfg(not(feature = "aws-lc"))]
fn is_on_curve(curve: Curve, point: &[u8]) -> bool {
    use ring::agreement::{agree_ephemeral, EphemeralPrivateKey, UnparsedPublicKey, ECDH_P256, ECDH_P384};
    let how = match curve {
        Curve::P256 => &ECDH_P256,
        Curve::P384 => &ECDH_P384,
        Curve::P521 => return false,
    };
    EphemeralPrivateKey::generate(how, &ring::rand::SystemRandom::new())
        .and_then(|own| agree_ephemeral(own, &UnparsedPublicKey::new(how, point), |_| ()))
        .is_ok()
}

#[cfg(feature = "aws-lc")]
fn is_on_curve(curve: Curve, point: &[u8]) -> bool {
    let how = match curve {
        Curve::P256 => &signature::ECDSA_P256_SHA256_FIXED,
        Curve::P384 => &signature::ECDSA_P384_SHA384_FIXED,
        Curve::P521 => &signature::ECDSA_P521_SHA512_FIXED,
    };
    signature::ParsedPublicKey::new(how, point).is_ok()
}

/// Keys of tests, which sign.
#[cfg(test)]
pub mod signing {
    #![allow(clippy::unwrap_used)]
    #[cfg(feature = "aws-lc")]
    use aws_lc_rs::{rand::SystemRandom, signature};
    #[cfg(not(feature = "aws-lc"))]
    use ring::{rand::SystemRandom, signature};

    use signature::{EcdsaKeyPair, Ed25519KeyPair, KeyPair, ECDSA_P256_SHA256_FIXED_SIGNING};

    pub enum Signer {
        Es256(EcdsaKeyPair),
        EdDsa(Ed25519KeyPair),
    }

    impl Signer {
        pub fn es256() -> Self {
            let (how, chance) = (&ECDSA_P256_SHA256_FIXED_SIGNING, SystemRandom::new());
            let document = EcdsaKeyPair::generate_pkcs8(how, &chance).unwrap();
            #[cfg(not(feature = "aws-lc"))]
            return Signer::Es256(EcdsaKeyPair::from_pkcs8(how, document.as_ref(), &chance).unwrap());
            #[cfg(feature = "aws-lc")]
            Signer::Es256(EcdsaKeyPair::from_pkcs8(how, document.as_ref()).unwrap())
        }

        pub fn eddsa() -> Self {
            let document = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).unwrap();
            Signer::EdDsa(Ed25519KeyPair::from_pkcs8(document.as_ref()).unwrap())
        }

        pub fn public(&self) -> &[u8] {
            match self {
                Signer::Es256(key) => key.public_key().as_ref(),
                Signer::EdDsa(key) => key.public_key().as_ref(),
            }
        }

        pub fn sign(&self, message: &[u8]) -> Vec<u8> {
            match self {
                Signer::Es256(key) => key.sign(&SystemRandom::new(), message).unwrap().as_ref().to_vec(),
                Signer::EdDsa(key) => key.sign(message).as_ref().to_vec(),
            }
        }
    }
}
