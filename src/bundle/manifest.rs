//! What is in a bundle, as its first member says.

use std::collections::HashSet;

use serde::{Deserialize, Serialize};

use super::{BundleError, MANIFEST, MANIFEST_DIGEST};

/// The version of the format that is written, and the newest that is read.
pub const FORMAT_VERSION: u32 = 1;

/// The contents of a bundle.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// See [`FORMAT_VERSION`].
    pub format_version: u32,
    /// When it was made, such as `2027-01-31T12:00:00Z`.
    pub created: String,
    /// The program that made it.
    pub program: Program,
    /// The model.
    pub model: Model,
    /// All files beside the manifest and its digest, in the archive's order.
    pub files: Vec<File>,
}

/// The program that made a bundle.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Program {
    /// Its version.
    pub version: String,
    /// Its licence, as an SPDX expression.
    pub license: String,
    /// Its file, if it is in the bundle.
    pub path: Option<String>,
}

/// The model of a bundle.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Model {
    /// The name it is served under.
    pub name: String,
    /// What its weights are stored as, such as `Q4_K_M`.
    pub quantization: String,
    /// What `--model` takes: a file, of a split model the first one, or a directory.
    pub path: String,
    /// What is known of its licence.
    pub license: License,
}

/// What is known of a model's licence, and who says so.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct License {
    /// `general.license` of a GGUF file, usually an SPDX expression.
    pub stated: Option<String>,
    /// `general.license.name` of a GGUF file.
    pub stated_name: Option<String>,
    /// `general.license.link` of a GGUF file.
    pub stated_link: Option<String>,
    /// What this program's catalogue says.
    pub catalogue: Option<String>,
    /// The files of the bundle with its text.
    pub files: Vec<String>,
}

/// A file of a bundle.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct File {
    /// Its path, relative and with slashes.
    pub path: String,
    /// Its size.
    pub num_bytes: u64,
    /// Its SHA-256, 64 hexadecimal digits in lower case.
    pub sha256: String,
}

impl License {
    /// In a few words, if anything is known.
    pub fn summary(&self) -> Option<String> {
        let stated = self.stated_name.as_ref().or(self.stated.as_ref());
        let files = || (!self.files.is_empty()).then(|| self.files.join(", "));
        stated.or(self.catalogue.as_ref()).cloned().or_else(files)
    }
}

impl Manifest {
    /// Reads a manifest and checks that it makes sense.
    ///
    /// # Errors
    /// If it is of a newer version, or names files that no bundle of ours has.
    pub fn parse(bytes: &[u8]) -> Result<Self, BundleError> {
        #[derive(Deserialize)]
        struct Version {
            format_version: u64,
        }
        let unreadable = |error| BundleError::Damaged(format!("{MANIFEST} is unreadable: {error}"));
        // What a newer version looks like is not known.
        let Version { format_version } = serde_json::from_slice(bytes).map_err(unreadable)?;
        if u64::from(FORMAT_VERSION) < format_version {
            return Err(BundleError::Newer(format_version));
        }
        let manifest: Self = serde_json::from_slice(bytes).map_err(unreadable)?;
        manifest.check().map_err(BundleError::Hostile)?;
        Ok(manifest)
    }

    fn check(&self) -> Result<(), String> {
        let mut paths = HashSet::from([MANIFEST, MANIFEST_DIGEST]);
        for file in &self.files {
            let path = file.path.escape_debug();
            if let Some(problem) = path_problem(&file.path) {
                return Err(format!("it names a file `{path}`, which {problem}"));
            }
            if !paths.insert(&file.path) {
                return Err(format!("it names `{path}` twice"));
            }
            if !is_digest(&file.sha256) {
                return Err(format!("it has no SHA-256 of `{path}`"));
            }
        }
        let is_file = |path: &str| self.files.iter().any(|file| file.path == path);
        let is_directory = |path: &str| {
            let inside = format!("{path}/");
            self.files.iter().any(|file| file.path.starts_with(&inside))
        };
        if self.program.path.as_deref().is_some_and(|path| !is_file(path)) {
            return Err("the program that it names is not among its files".to_owned());
        }
        let model = &self.model.path;
        if !is_file(model) && !is_directory(model) {
            return Err("the model that it names is not among its files".to_owned());
        }
        Ok(())
    }
}

fn is_digest(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

/// Why a path cannot be that of a bundle's file, if so: joined to a directory, it must lie inside.
pub(super) fn path_problem(path: &str) -> Option<&'static str> {
    if path.starts_with('/') {
        return Some("is absolute");
    }
    if path.split('/').any(|part| part == "..") {
        return Some("leads out of the directory");
    }
    let is_odd = |part: &str| {
        part.is_empty() || part == "." || part.contains(|c: char| c.is_control() || c == '\\')
    };
    path.split('/').any(is_odd).then_some("is no plain path")
}
