//! A model as Hugging Face's repositories have it: a directory of JSON files and safetensors.
//!
//! [`Repository::open`] reads `config.json` and maps the weights: the files that an index
//! (`model.safetensors.index.json`) names, or the only one there is. What the weights mean,
//! [`super::checkpoint`] knows.

mod error;
mod json_file;
#[cfg(test)]
mod tests;

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};

pub use error::{Problem, RepositoryError};
pub use json_file::JsonFile;

use super::gguf::shown;
use super::safetensors::{ElementType, Safetensors, TensorInfo};
use super::tensor_bytes::TensorBytes;

const INDEX_SUFFIX: &str = ".safetensors.index.json";
const WEIGHTS_SUFFIX: &str = ".safetensors";
const DESCRIPTION_SUFFIX: &str = ".json";
/// More files than any published model has.
const MAX_FILES: usize = 1024;

/// A repository's directory, its weights mapped and checked.
#[derive(Debug)]
pub struct Repository {
    directory: PathBuf,
    config: JsonFile,
    files: Vec<Safetensors>,
    /// File and number of each tensor.
    index: HashMap<String, (usize, usize)>,
}

impl Repository {
    /// Whether a directory looks like a repository with weights.
    pub fn is_in(directory: &Path) -> bool {
        let has_weights = || {
            let names = file_names(directory);
            names.iter().any(|name| name.ends_with(WEIGHTS_SUFFIX) || name.ends_with(INDEX_SUFFIX))
        };
        directory.join("config.json").is_file() && has_weights()
    }

    /// Opens a directory.
    pub fn open(directory: &Path) -> Result<Self, RepositoryError> {
        let config = JsonFile::open(&directory.join("config.json"))?;
        let mut repository = Self {
            directory: directory.to_path_buf(),
            config,
            files: Vec::new(),
            index: HashMap::new(),
        };
        let names = file_names(directory);
        let mut indices = names.iter().filter(|name| name.ends_with(INDEX_SUFFIX));
        match (indices.next(), indices.next()) {
            (Some(index), None) => repository.add_indexed(index)?,
            (None, _) => repository.add_only_file(&names)?,
            (Some(_), Some(_)) => {
                return Err(RepositoryError::unsupported(directory, "several lists of weights"));
            }
        }
        Ok(repository)
    }

    /// The directory.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// `config.json`.
    pub fn config(&self) -> &JsonFile {
        &self.config
    }

    /// Another of the JSON files, if it is there.
    pub fn json(&self, name: &str) -> Result<Option<JsonFile>, RepositoryError> {
        let path = self.directory.join(name);
        if path.exists() { JsonFile::open(&path).map(Some) } else { Ok(None) }
    }

    /// Another file's bytes, if it is there.
    pub fn file(&self, name: &str) -> Result<Option<Vec<u8>>, RepositoryError> {
        let path = self.directory.join(name);
        if path.exists() { json_file::read(&path).map(Some) } else { Ok(None) }
    }

    /// The files with weights.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(Safetensors::path)
    }

    /// The size of the files with weights.
    pub fn num_file_bytes(&self) -> usize {
        self.files.iter().map(Safetensors::num_bytes).sum()
    }

    /// All tensors, file by file.
    pub fn tensors(&self) -> impl Iterator<Item = &TensorInfo> {
        self.files.iter().flat_map(Safetensors::tensors)
    }

    /// What a tensor is, if there is one of this name.
    pub fn info(&self, name: &str) -> Option<&TensorInfo> {
        let &(file, tensor) = self.index.get(name)?;
        Some(&self.files[file].tensors()[tensor])
    }

    /// Whether there is a parameter of this name. A head that is tied to the embedding is none,
    /// even if a copy of it was stored.
    pub fn has_parameter(&self, name: &str) -> bool {
        self.info(name).is_some() && !(self.is_head_tied() && name == "lm_head.weight")
    }

    /// Whether the output head is the embedding.
    pub fn is_head_tied(&self) -> bool {
        self.config.value()["tie_word_embeddings"] == true
    }

    /// What the weights are stored as: the type that most of their bytes have.
    pub fn quantization(&self) -> String {
        let mut num_bytes: HashMap<ElementType, usize> = HashMap::new();
        for tensor in self.tensors() {
            *num_bytes.entry(tensor.dtype).or_default() += tensor.num_bytes();
        }
        let largest = num_bytes.into_iter().max_by_key(|&(dtype, bytes)| (bytes, dtype));
        largest.map_or("none", |(dtype, _)| dtype.name()).to_owned()
    }

    /// A tensor and its bytes.
    pub fn tensor(&self, name: &str) -> Result<(&TensorInfo, TensorBytes), RepositoryError> {
        let Some(&(file, tensor)) = self.index.get(name) else {
            let problem = Problem::MissingTensor(name.to_owned());
            return Err(RepositoryError::new(&self.directory, problem));
        };
        let file = &self.files[file];
        let tensor = &file.tensors()[tensor];
        Ok((tensor, file.bytes(tensor)))
    }

    /// An error about a tensor, naming its file.
    pub fn complaint(&self, name: &str, what: &str) -> RepositoryError {
        let file = self.index.get(name).map(|&(file, _)| self.files[file].path());
        let problem = Problem::Malformed(format!("tensor `{}` {what}", shown(name)));
        RepositoryError::new(file.unwrap_or(&self.directory), problem)
    }

    /// Gives back the memory of all pages read so far; reading on is possible, from the disk.
    pub fn release_pages(&self) {
        self.files.iter().for_each(Safetensors::release_pages);
    }

    /// Opens the files that an index names, and checks that they have the tensors it says.
    fn add_indexed(&mut self, index_name: &str) -> Result<(), RepositoryError> {
        let index = JsonFile::open(&self.directory.join(index_name))?;
        let Some(weight_map) = index.value()["weight_map"].as_object() else {
            return Err(index.complaint("has no object `weight_map`"));
        };
        let mut names = BTreeSet::new();
        for (tensor, file) in weight_map {
            let is_name = |name: &&str| !name.is_empty() && !name.contains(['/', '\\', '\0']);
            let Some(file) = file.as_str().filter(is_name) else {
                let what = format!("names no file of this directory for `{}`", shown(tensor));
                return Err(index.complaint(&what));
            };
            names.insert(file);
        }
        if MAX_FILES < names.len() {
            return Err(index.complaint(&format!("names {} files", names.len())));
        }
        for name in names {
            let path = self.directory.join(name);
            if !path.exists() {
                let problem = Problem::MissingFile { expected: path };
                return Err(RepositoryError::new(index.path(), problem));
            }
            self.add(Safetensors::open(&path)?)?;
        }
        for (tensor, file) in weight_map {
            let found = self.index.get(tensor).map(|&(file, _)| self.files[file].path());
            if found.and_then(Path::file_name).is_none_or(|name| file != &*name.to_string_lossy()) {
                let file = shown(file.as_str().unwrap_or_default());
                let tensor = shown(tensor);
                return Err(
                    index.complaint(&format!("wants `{tensor}` in {file}, where it is not"))
                );
            }
        }
        Ok(())
    }

    fn add_only_file(&mut self, names: &[String]) -> Result<(), RepositoryError> {
        let is_usual = |name: &&String| *name == "model.safetensors";
        let mut weights = names.iter().filter(|name| name.ends_with(WEIGHTS_SUFFIX));
        let usual = weights.clone().find(is_usual);
        let name = match (usual, weights.next(), weights.next()) {
            (Some(name), ..) | (None, Some(name), None) => name,
            (None, None, _) => {
                let expected = self.directory.join("model.safetensors");
                return Err(RepositoryError::new(&self.directory, Problem::NoWeights { expected }));
            }
            (None, Some(_), Some(_)) => {
                let what = "several files of weights and no `model.safetensors.index.json`";
                return Err(RepositoryError::unsupported(&self.directory, what));
            }
        };
        self.add(Safetensors::open(&self.directory.join(name))?)
    }

    fn add(&mut self, file: Safetensors) -> Result<(), RepositoryError> {
        for (number, tensor) in file.tensors().iter().enumerate() {
            let place = (self.files.len(), number);
            if let Some((other, _)) = self.index.insert(tensor.name.clone(), place) {
                let other = self.files[other].path().display();
                let name = shown(&tensor.name);
                let problem = Problem::Malformed(format!("tensor `{name}` is in {other} too"));
                return Err(RepositoryError::new(file.path(), problem));
            }
        }
        self.files.push(file);
        Ok(())
    }
}

/// Whether a file of a repository on the hub is needed to run its model: not the other formats, nor
/// what lies in folders.
pub fn is_repository_file(name: &str) -> bool {
    let is_description = name == "chat_template.jinja"
        || name.ends_with(DESCRIPTION_SUFFIX) && !name.ends_with(".bin.index.json");
    !name.contains('/') && (is_description || name.ends_with(WEIGHTS_SUFFIX))
}

/// The names of a directory's files, in order; none where it cannot be read.
fn file_names(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries
        .filter(|entry| entry.path().is_file())
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    names.sort();
    names
}
