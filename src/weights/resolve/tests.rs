//! Goal: every kind of argument finds its model, and what finds none says why. Method: files and
//! caches in temporary directories; the hub is offline.

use tempfile::TempDir;

use super::*;
use crate::weights::hub::HubConfig;

fn offline_hub(directory: &TempDir) -> Hub {
    Hub::new(HubConfig {
        cache_dir: directory.path().to_path_buf(),
        endpoint: "http://127.0.0.1:1".to_owned(),
        token: None,
        offline: true,
        proxy: None,
    })
    .unwrap()
}

fn touch(directory: &TempDir, path: &str) -> PathBuf {
    let path = directory.path().join(path);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(&path, b"GGUF").unwrap();
    path
}

fn find(argument: &str, directory: &TempDir) -> Result<ResolvedModel, ResolveError> {
    resolve(argument, &offline_hub(directory), &mut ())
}

fn find_path(path: &Path, directory: &TempDir) -> Result<ResolvedModel, ResolveError> {
    find(path.to_str().unwrap(), directory)
}

#[test]
fn files_are_taken_as_they_are() {
    let directory = tempfile::tempdir().unwrap();
    let path = touch(&directory, "my model.Q8_0.gguf");
    let model = find_path(&path, &directory).unwrap();
    assert_eq!((model.path, model.name.as_str()), (path, "my model.Q8_0"));
    assert!(model.entry.is_none());

    let first = touch(&directory, "m-00001-of-00002.gguf");
    let second = touch(&directory, "m-00002-of-00002.gguf");
    let model = find_path(&second, &directory).unwrap();
    assert_eq!((model.path, model.name.as_str()), (first, "m"));

    let known = touch(&directory, "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf");
    let model = find_path(&known, &directory).unwrap();
    assert_eq!(model.name, "qwen2.5-coder-0.5b-instruct");
    assert_eq!(model.entry.unwrap().model.num_hidden_layers, 24);
}

#[test]
fn directories_hold_one_model() {
    let directory = tempfile::tempdir().unwrap();
    let path = touch(&directory, "one/m-00001-of-00002.gguf");
    touch(&directory, "one/m-00002-of-00002.gguf");
    touch(&directory, "one/mmproj-m.gguf");
    touch(&directory, "one/README.md");
    assert_eq!(find_path(&directory.path().join("one"), &directory).unwrap().path, path);

    touch(&directory, "two/a-q4_0.gguf");
    touch(&directory, "two/b-q4_0.gguf");
    touch(&directory, "tensors/model.safetensors");
    touch(&directory, "none/config.json");
    for (name, part) in [
        ("two", "a-q4_0.gguf, b-q4_0.gguf"),
        ("tensors", "no repository with config.json"),
        ("none", "holds no .gguf file"),
    ] {
        let error = find_path(&directory.path().join(name), &directory).unwrap_err();
        assert!(error.to_string().contains(part), "{error}");
    }
}

/// A directory with safetensors, its files and its snapshot in a cache are one model.
#[test]
fn repositories_are_directories() {
    let directory = tempfile::tempdir().unwrap();
    let tensors = touch(&directory, "my-model/model.safetensors");
    let mine = tensors.parent().unwrap().to_path_buf();
    std::fs::write(mine.join("config.json"), "{}").unwrap();
    for path in [&mine, &tensors] {
        let model = find_path(path, &directory).unwrap();
        assert_eq!((&model.path, model.name.as_str()), (&mine, "my-model"));
        assert!(model.entry.is_none());
    }

    let repo = "models--Qwen--Qwen2.5-0.5B-Instruct";
    let tensors = touch(&directory, &format!("{repo}/snapshots/abc/model.safetensors"));
    let snapshot = tensors.parent().unwrap().to_path_buf();
    std::fs::write(snapshot.join("config.json"), "{}").unwrap();
    let model = find_path(&snapshot, &directory).unwrap();
    assert_eq!((&model.path, model.name.as_str()), (&snapshot, "qwen2.5-0.5b-instruct"));
    // Broken weights are fetched again; these are no weights at all.
    let error = find("Qwen/Qwen2.5-0.5B-Instruct:safetensors", &directory).unwrap_err();
    assert!(error.to_string().contains("HF_HUB_OFFLINE"), "{error}");
    std::fs::write(&tensors, [&2_u64.to_le_bytes()[..], b"{}"].concat()).unwrap();
    let model = find("Qwen/Qwen2.5-0.5B-Instruct:safetensors", &directory).unwrap();
    assert_eq!(model.path, snapshot);

    let other = touch(&directory, "models--me--Float/snapshots/abc/model.safetensors");
    let other = other.parent().unwrap().to_path_buf();
    std::fs::write(other.join("config.json"), "{}").unwrap();
    std::fs::write(other.join("model.safetensors"), [&2_u64.to_le_bytes()[..], b"{}"].concat())
        .unwrap();
    let model = find("me/Float", &directory).unwrap();
    assert_eq!((&model.path, model.name.as_str()), (&other, "me/Float"));
}

#[test]
fn names_and_ids_are_found_in_the_cache() {
    let directory = tempfile::tempdir().unwrap();
    let repo = "models--Qwen--Qwen2.5-Coder-0.5B-Instruct-GGUF";
    let file = "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf";
    let path = touch(&directory, &format!("{repo}/snapshots/abc/{file}"));
    for argument in [
        "qwen2.5-coder-0.5b-instruct",
        "Qwen2.5-Coder-0.5B-Instruct:Q4_K_M",
        "Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF",
        "Qwen/Qwen2.5-Coder-0.5B-Instruct",
        "Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF:qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
    ] {
        let model = find(argument, &directory).unwrap();
        assert_eq!(model.path, path, "{argument}");
        assert_eq!(model.name, "qwen2.5-coder-0.5b-instruct");
        assert!(model.entry.is_some());
    }
    std::fs::create_dir_all(directory.path().join(repo).join("refs")).unwrap();
    std::fs::write(directory.path().join(repo).join("refs/main"), "abc\n").unwrap();
    assert_eq!(find_path(&directory.path().join(repo), &directory).unwrap().path, path);

    let other = touch(&directory, "models--me--Mine/snapshots/abc/mine.Q5_K_M.gguf");
    for argument in ["me/Mine", "me/Mine:q5_k_m", "me/Mine:mine.Q5_K_M.gguf"] {
        let model = find(argument, &directory).unwrap();
        assert_eq!((model.path, model.name.as_str()), (other.clone(), "me/Mine"));
    }
}

#[test]
fn what_is_not_there_is_explained() {
    let directory = tempfile::tempdir().unwrap();
    for (argument, part) in [
        ("/no/such/file.gguf", "no file `/no/such/file.gguf`"),
        ("./model", "no file `./model`"),
        ("model.gguf", "no file `model.gguf`"),
        ("sub/model.gguf", "no file `sub/model.gguf`"),
        ("qwen2.5-coder", "did you mean `qwen2.5-coder-0.5b-instruct`?"),
        ("qwen2.5-0.5b-instruct:q7", "has no quantisation `q7`"),
        ("qwen2.5-math-7b-instruct", "no official GGUF release"),
        ("qwen2.5-0.5b-instruct", "HF_HUB_OFFLINE"),
        ("me/Other:q4_0", "HF_HUB_OFFLINE"),
        ("", "there is no model named ``"),
        ("a/b/c", "there is no model named `a/b/c`"),
    ] {
        let message = find(argument, &directory).unwrap_err().to_string();
        assert!(message.contains(part), "{argument}: {message}");
        assert!(!message.contains('\n'));
    }
}

#[test]
fn files_are_chosen_from_a_listing() {
    let names: Vec<String> = [
        "README.md",
        "m-q4_k_m-00001-of-00002.gguf",
        "m-q4_k_m-00002-of-00002.gguf",
        "m-q4_k_m.gguf",
        "M.IQ4_XS.gguf",
        "fp16/m-fp16-00001-of-00002.gguf",
        "fp16/m-fp16-00002-of-00002.gguf",
        "m-q8_0-00001-of-00002.gguf",
    ]
    .map(str::to_owned)
    .to_vec();
    assert_eq!(choose(&names, None).unwrap(), ["m-q4_k_m.gguf"]);
    assert_eq!(choose(&names, Some("iq4_xs")).unwrap(), ["M.IQ4_XS.gguf"]);
    assert_eq!(choose(&names, Some("fp16")).unwrap(), names[5..7]);
    assert_eq!(choose(&names, Some("m-q4_k_m-00001-of-00002.gguf")).unwrap(), names[1..3]);
    assert!(choose(&names, Some("k_m")).is_ok_and(|chosen| chosen == ["m-q4_k_m.gguf"]));
    assert_eq!(choose(&names, Some("q8_0")).unwrap_err(), "file `m-q8_0-00002-of-00002.gguf`");
    assert_eq!(choose(&names, Some("q2_k")).unwrap_err(), "quantisation `q2_k`");
}

#[test]
fn a_listing_without_gguf_is_explained() {
    let message = |names: &[&str]| {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        not_in_repo("a/b", "quantisation `q4_k_m`".to_owned(), &names).to_string()
    };
    assert!(message(&["model.safetensors"]).contains("safetensors"));
    assert!(message(&["x-q8_0.gguf"]).contains("one of x-q8_0.gguf"));
    assert!(message(&[]).contains("-GGUF"));
}
