//! Turns what a user typed after `--model` into a file on this machine.
//!
//! In this order: a file, a directory, a name of the catalogue, a hub id. Names and ids are looked
//! up in the cache first and fetched otherwise. A directory that holds no GGUF file may be a
//! repository with safetensors, and so may a hub id.

#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};

use super::catalogue::{
    Catalogue, DEFAULT_QUANTIZATION, Entry, SelectError, Selection, split_name,
};
use super::gguf;
use super::hub::{Hub, HubError, Progress, Reason, RemoteFile, is_repo_id};
use super::repository::{Repository, is_repository_file};

/// A model that is on this machine.
#[derive(Clone, Debug)]
pub struct ResolvedModel {
    /// Its GGUF file, of a split model the first one; or a repository's directory.
    pub path: PathBuf,
    /// The name it is served under, unless another one is given.
    pub name: String,
    /// What the catalogue knows about it, if anything.
    pub entry: Option<Entry>,
}

/// An argument that leads to no model.
#[derive(Debug, thiserror::Error)]
pub enum ResolveError {
    /// A path that does not exist.
    #[error(
        "there is no file `{0}`; check the path, or pass a name from `qwen-server models` to \
         download it"
    )]
    NoSuchPath(String),
    /// A directory without a model.
    #[error(
        "the directory {} holds no .gguf file, and no repository with config.json and safetensors; \
         pass the directory or the file of a model", .0.display()
    )]
    NoModel(PathBuf),
    /// A directory with several models.
    #[error("the directory {} holds several models, pass the path of one of them: {models}", path.display())]
    SeveralModels {
        /// The directory.
        path: PathBuf,
        /// Their first files.
        models: String,
    },
    /// A repository without the wanted file.
    #[error("`{repo}` has no {wanted}; {hint}")]
    NotInRepo {
        /// The repository.
        repo: String,
        /// What was looked for.
        wanted: String,
        /// What there is.
        hint: String,
    },
    /// Not in the catalogue.
    #[error(transparent)]
    Select(#[from] SelectError),
    /// The hub could not help.
    #[error(transparent)]
    Hub(#[from] HubError),
}

/// Finds the model that an argument means, fetching it if it is not on this machine.
pub fn resolve(
    argument: &str,
    hub: &Hub,
    progress: &mut dyn Progress,
) -> Result<ResolvedModel, ResolveError> {
    let catalogue = Catalogue::builtin();
    let path = Path::new(argument);
    if path.is_file() && !is_safetensors(argument) {
        return Ok(local(path, &catalogue));
    }
    if path.is_file() {
        return in_directory(directory_of(path), &catalogue);
    }
    if path.is_dir() {
        return in_directory(path, &catalogue);
    }
    if looks_like_path(argument) {
        return Err(ResolveError::NoSuchPath(argument.to_owned()));
    }
    let (base, wanted) = split_name(argument);
    let names_file = wanted.is_some_and(|wanted| is_gguf(wanted) || is_repository_wish(wanted));
    match catalogue.find(base) {
        Some(_) if !names_file => {
            let selection = catalogue.select(argument)?;
            Ok(named(fetch_selection(selection, hub, progress)?, selection.entry))
        }
        _ if is_repo_id(base) => {
            let path = fetch_from_repo(base, wanted, hub, progress)?;
            let known = catalogue.find(base).or_else(|| entry_of(&path, &catalogue));
            Ok(match known {
                Some(entry) => named(path, entry),
                None => ResolvedModel { path, name: base.to_owned(), entry: None },
            })
        }
        _ => Err(catalogue
            .select(argument)
            .map_or_else(Into::into, |_| ResolveError::NoSuchPath(argument.to_owned()))),
    }
}

/// Where a quantisation is on this machine, if all its files are.
pub fn find_local(selection: Selection<'_>, hub: &Hub) -> Option<PathBuf> {
    let repo = &selection.release.repo;
    let paths = selection.file_names().into_iter().map(|name| hub.cached(repo, &name));
    first_of(paths.collect::<Option<Vec<_>>>()?)
}

fn local(path: &Path, catalogue: &Catalogue) -> ResolvedModel {
    let path = gguf::first_part(path);
    match entry_of(&path, catalogue) {
        Some(entry) => named(path, entry),
        None => ResolvedModel { name: model_name(&path), path, entry: None },
    }
}

fn named(path: PathBuf, entry: &Entry) -> ResolvedModel {
    ResolvedModel { path, name: entry.model.name.clone(), entry: Some(entry.clone()) }
}

/// The model of a directory: its GGUF file, or the directory as a repository.
fn in_directory(path: &Path, catalogue: &Catalogue) -> Result<ResolvedModel, ResolveError> {
    let directory = snapshot_of(path).unwrap_or_else(|| path.to_path_buf());
    let names = file_names(&directory);
    let mut models: Vec<&String> = names.iter().filter(|name| is_model_start(name)).collect();
    models.sort();
    match models[..] {
        [name] => Ok(local(&directory.join(name), catalogue)),
        [] if Repository::is_in(&directory) => {
            let name = repository_name(&directory);
            Ok(match catalogue.find(&name) {
                Some(entry) => named(directory, entry),
                None => ResolvedModel { path: directory, name, entry: None },
            })
        }
        [] => Err(ResolveError::NoModel(path.to_path_buf())),
        _ => {
            let models: Vec<&str> = models.iter().map(|name| name.as_str()).collect();
            let models = models.join(", ");
            Err(ResolveError::SeveralModels { path: path.to_path_buf(), models })
        }
    }
}

fn directory_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// The hub's id where the directory is a snapshot in a cache, otherwise the directory's name.
fn repository_name(directory: &Path) -> String {
    let whole = directory.canonicalize().unwrap_or_else(|_| directory.to_path_buf());
    let name = |path: &Path| path.file_name().map(|name| name.to_string_lossy().into_owned());
    let id = whole.ancestors().nth(2).and_then(name).and_then(|folder| {
        let id = folder.strip_prefix("models--")?.replacen("--", "/", 1);
        is_repo_id(&id).then_some(id)
    });
    id.or_else(|| name(&whole)).unwrap_or_default()
}

fn entry_of<'a>(path: &Path, catalogue: &'a Catalogue) -> Option<&'a Entry> {
    let file_name = path.file_name()?.to_str()?;
    catalogue.find_by_file(file_name).map(|selection| selection.entry)
}

/// A file's name without extension and part number.
fn model_name(path: &Path) -> String {
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    match gguf::part_of(path) {
        Some(_) => stem[..stem.len() - "-00001-of-00001".len()].to_owned(),
        None => stem.into_owned(),
    }
}

/// The current snapshot, if a directory is a repository of the hub's cache.
fn snapshot_of(path: &Path) -> Option<PathBuf> {
    let commit = std::fs::read_to_string(path.join("refs/main")).ok()?;
    let snapshot = path.join("snapshots").join(commit.trim());
    snapshot.is_dir().then_some(snapshot)
}

fn file_names(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.path().is_file())
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect()
}

fn fetch_selection(
    selection: Selection<'_>,
    hub: &Hub,
    progress: &mut dyn Progress,
) -> Result<PathBuf, ResolveError> {
    let repo = &selection.release.repo;
    let mut paths = Vec::new();
    for (index, name) in selection.file_names().iter().enumerate() {
        let sha256 = selection.file.sha256.get(index).map(String::as_str);
        match hub.fetch(RemoteFile { repo, name, sha256 }, progress) {
            Ok(path) => paths.push(path),
            // The release may be cut into other parts than the catalogue says.
            Err(HubError { reason: Reason::NoSuchFile { .. }, .. }) if sha256.is_none() => {
                return fetch_from_repo(repo, Some(&selection.file.quantization), hub, progress);
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(first_of(paths).expect("a quantisation has at least one file"))
}

/// What a user may write for a repository's safetensors where it has GGUF files too.
fn is_repository_wish(wanted: &str) -> bool {
    wanted.eq_ignore_ascii_case("safetensors")
}

/// Fetches a file or quantisation of any repository, or its safetensors if that is wished for or
/// all there is; what was fetched before needs no network.
fn fetch_from_repo(
    repo: &str,
    wanted: Option<&str>,
    hub: &Hub,
    progress: &mut dyn Progress,
) -> Result<PathBuf, ResolveError> {
    for snapshot in hub.snapshots(repo) {
        let names = file_names(&snapshot);
        if let Ok(chosen) = choose(&names, wanted)
            && chosen.iter().all(|name| snapshot.join(name).is_file())
        {
            return Ok(snapshot.join(&chosen[0]));
        }
        if wanted.map_or(!has_gguf(&names), is_repository_wish)
            && Repository::open(&snapshot).is_ok()
        {
            return Ok(snapshot);
        }
    }
    let names = hub.file_names(repo)?;
    let is_repository = names.iter().any(|name| is_safetensors(name));
    if is_repository && wanted.map_or(!has_gguf(&names), is_repository_wish) {
        return fetch_repository(repo, &names, hub, progress);
    }
    let chosen = choose(&names, wanted).map_err(|wanted| not_in_repo(repo, wanted, &names))?;
    let fetched = chosen.iter().map(|name| {
        hub.fetch(RemoteFile { repo, name, sha256: None }, progress).map_err(ResolveError::from)
    });
    let paths = fetched.collect::<Result<Vec<_>, _>>()?;
    Ok(first_of(paths).expect("at least one file was chosen"))
}

/// Fetches what a repository with safetensors needs to be served.
fn fetch_repository(
    repo: &str,
    names: &[String],
    hub: &Hub,
    progress: &mut dyn Progress,
) -> Result<PathBuf, ResolveError> {
    let mut path = None;
    for name in names.iter().filter(|name| is_repository_file(name)) {
        path = Some(hub.fetch(RemoteFile { repo, name, sha256: None }, progress)?);
    }
    let directory = path.as_deref().map(directory_of).map(Path::to_path_buf);
    Ok(directory.unwrap_or_default())
}

/// The files of a repository that a wish means, or a description of what was looked for.
fn choose(names: &[String], wanted: Option<&str>) -> Result<Vec<String>, String> {
    let starts = || names.iter().filter(|name| is_model_start(name));
    let first = match wanted {
        Some(file) if is_gguf(file) => {
            starts().find(|name| name.eq_ignore_ascii_case(file)).ok_or(format!("file `{file}`"))?
        }
        Some(quantization) => starts()
            .filter(|name| has_quantization(name, quantization))
            // A whole file before a split one.
            .min_by_key(|name| gguf::part_of(Path::new(name)).is_some())
            .ok_or(format!("quantisation `{quantization}`"))?,
        None => {
            let default = starts().filter(|name| has_quantization(name, DEFAULT_QUANTIZATION));
            let default = default.min_by_key(|name| gguf::part_of(Path::new(name)).is_some());
            let mut all = starts();
            match (default, all.next(), all.next()) {
                (Some(name), ..) | (None, Some(name), None) => name,
                _ => return Err(format!("quantisation `{DEFAULT_QUANTIZATION}`")),
            }
        }
    };
    let Some((_, count)) = gguf::part_of(Path::new(first)) else {
        return Ok(vec![first.clone()]);
    };
    let stem = &first[..first.len() - "00001-of-00001.gguf".len()];
    let parts = (1..=count).map(|part| format!("{stem}{part:05}-of-{count:05}.gguf"));
    let parts: Vec<String> = parts.collect();
    match parts.iter().find(|part| !names.contains(part)) {
        Some(missing) => Err(format!("file `{missing}`")),
        None => Ok(parts),
    }
}

fn not_in_repo(repo: &str, wanted: String, names: &[String]) -> ResolveError {
    let available: Vec<&str> =
        names.iter().filter(|name| is_model_start(name)).map(String::as_str).take(24).collect();
    let hint = if available.is_empty() && names.iter().any(|name| is_safetensors(name)) {
        format!("it has safetensors, which `{repo}` without anything behind it means")
    } else if available.is_empty() {
        "look for a repository whose name ends in -GGUF".to_owned()
    } else {
        format!("pass `{repo}:FILE` with one of {}", available.join(", "))
    };
    ResolveError::NotInRepo { repo: repo.to_owned(), wanted, hint }
}

/// `stem-q4_k_m.gguf`, `stem.Q4_K_M.gguf` or the first part of either.
fn has_quantization(name: &str, quantization: &str) -> bool {
    let stem = name.to_lowercase();
    let stem = stem.strip_suffix(".gguf").unwrap_or(&stem);
    let stem = match gguf::part_of(Path::new(name)) {
        Some(_) => &stem[..stem.len() - "-00001-of-00001".len()],
        None => stem,
    };
    stem.strip_suffix(&quantization.to_lowercase())
        .is_some_and(|rest| rest.is_empty() || rest.ends_with(['-', '.', '_', '/']))
}

/// Whether a file is a whole model or the first part of one, and not a part of another kind.
fn is_model_start(name: &str) -> bool {
    let is_first = gguf::part_of(Path::new(name)).is_none_or(|(number, _)| number == 1);
    is_gguf(name) && is_first && !name.to_lowercase().contains("mmproj")
}

fn has_gguf(names: &[String]) -> bool {
    names.iter().any(|name| is_model_start(name))
}

fn is_gguf(name: &str) -> bool {
    has_extension(name, "gguf")
}

fn is_safetensors(name: &str) -> bool {
    has_extension(name, "safetensors")
}

fn has_extension(name: &str, extension: &str) -> bool {
    Path::new(name).extension().is_some_and(|found| found.eq_ignore_ascii_case(extension))
}

fn looks_like_path(argument: &str) -> bool {
    let is_hub_file = argument.split_once(':').is_some_and(|(repo, _)| is_repo_id(repo));
    argument.starts_with(['/', '.', '~']) || (is_gguf(argument) && !is_hub_file)
}

fn first_of(paths: Vec<PathBuf>) -> Option<PathBuf> {
    paths.into_iter().next()
}
