//! A model, and the program that serves it, in one file for machines without a network.
//!
//! A bundle is a tar archive that any tar reads:
//!
//! ```text
//! manifest.json      every other file with size and SHA-256, versions, licences
//! qwen-server        the program, unless it was left out
//! model/…            the model's files
//! manifest.sha256    the digest of the manifest
//! ```
//!
//! The manifest is the first member, so that names, sizes and versions are refused before anything
//! is written. Its length does not depend on the digests: [`pack()`] leaves room for it, reads
//! each file once, and fills the room at the end, so a digest is of the very bytes that were
//! written.
//!
//! **Invariant:** what [`unpack()`] accepts is what was packed, byte for byte: the files that the
//! manifest names, in its order, and nothing else.

mod error;
mod install;
pub mod manifest;
mod pack;
mod tar;
#[cfg(test)]
mod tests;
mod unpack;

use sha2::{Digest, Sha256};

pub use error::BundleError;
pub use install::install;
pub use manifest::Manifest;
pub use pack::{Source, pack};
pub use unpack::{Unpacked, unpack};

/// The member that describes the others.
pub const MANIFEST: &str = "manifest.json";
/// The member with the manifest's digest.
const MANIFEST_DIGEST: &str = "manifest.sha256";
/// Files are read and written in pieces of so many bytes.
const CHUNK_BYTES: usize = 1 << 20;

/// Told how many more bytes were read or written.
pub type Advance<'a> = &'a mut dyn FnMut(u64);

/// A digest as manifests write it.
fn hex(hasher: Sha256) -> String {
    hasher.finalize().iter().fold(String::new(), |text, byte| format!("{text}{byte:02x}"))
}

/// What [`MANIFEST_DIGEST`] says of a manifest; `sha256sum --check` reads it.
fn digest_line(digest: &str) -> String {
    format!("{digest}  {MANIFEST}\n")
}
