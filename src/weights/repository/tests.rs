//! Goal: files that belong together are one model, others are refused by name. Method: directories
//! written by hand.

use tempfile::TempDir;

use super::*;

/// A file of safetensors with bytes under the given names.
fn tensors(names: &[&str]) -> Vec<u8> {
    let entries: Vec<String> = names
        .iter()
        .enumerate()
        .map(|(i, name)| {
            format!(r#""{name}":{{"dtype":"U8","shape":[1],"data_offsets":[{i},{}]}}"#, i + 1)
        })
        .collect();
    let header = format!("{{{}}}", entries.join(","));
    let data: Vec<u8> = (0..names.len() as u8).collect();
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat()
}

/// A directory with an empty `config.json` and the given files.
fn directory(files: &[(&str, &[u8])]) -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("config.json"), "{}").unwrap();
    for (name, bytes) in files {
        std::fs::write(directory.path().join(name), bytes).unwrap();
    }
    directory
}

const INDEX: &str = "model.safetensors.index.json";

#[test]
fn parts_are_one_model() {
    let index = br#"{"weight_map":{"x":"one.safetensors","y":"two.safetensors"}}"#;
    let (one, two) = (tensors(&["x"]), tensors(&["z", "y"]));
    let files = [(INDEX, &index[..]), ("one.safetensors", &one), ("two.safetensors", &two)];
    let directory = directory(&files);
    assert!(Repository::is_in(directory.path()));
    let repository = Repository::open(directory.path()).unwrap();
    let names: Vec<&str> = repository.tensors().map(|tensor| tensor.name.as_str()).collect();
    assert_eq!(names, ["x", "z", "y"]);
    assert_eq!(repository.tensor("y").unwrap().1.as_ref(), [1]);
    assert_eq!(repository.paths().count(), 2);
    assert_eq!(repository.quantization(), "U8");
    let message = repository.tensor("w").unwrap_err().to_string();
    assert!(message.contains("the tensor `w` is missing"), "{message}");
}

#[test]
fn a_tied_head_is_none_even_if_it_is_there() {
    let directory = directory(&[("model.safetensors", &tensors(&["lm_head.weight"]))]);
    let open = || Repository::open(directory.path()).unwrap();
    assert!(open().has_parameter("lm_head.weight"));
    let config = r#"{"tie_word_embeddings": true}"#;
    std::fs::write(directory.path().join("config.json"), config).unwrap();
    assert!(!open().has_parameter("lm_head.weight"));
}

#[test]
fn what_does_not_belong_together_is_said_in_one_line() {
    let (x, y) = (tensors(&["x"]), tensors(&["y"]));
    let map = |json: &str| format!(r#"{{"weight_map":{json}}}"#).into_bytes();
    let index = |json: &str| directory(&[(INDEX, &map(json)), ("a.safetensors", &x)]);
    let cases = [
        (directory(&[]), "it has no safetensors weights"),
        (directory(&[("a.safetensors", &x), ("b.safetensors", &y)]), "several files of weights"),
        (directory(&[(INDEX, b"{}")]), "no object `weight_map`"),
        (directory(&[(INDEX, b"{")]), "it is not JSON"),
        (directory(&[(INDEX, b"3")]), "it is not a JSON object"),
        (directory(&[(INDEX, &map("{}")), ("b.safetensors.index.json", b"{}")]), "several lists"),
        (index(r#"{"x":"b.safetensors"}"#), "b.safetensors is missing"),
        (index(r#"{"x":"../a.safetensors"}"#), "names no file of this directory for `x`"),
        (index(r#"{"x":3}"#), "names no file of this directory for `x`"),
        (index(r#"{"x":"a.safetensors","w":"a.safetensors"}"#), "wants `w` in a.safetensors"),
        (
            directory(&[
                (INDEX, &map(r#"{"x":"a.safetensors","y":"b.safetensors"}"#)),
                ("a.safetensors", &x),
                ("b.safetensors", &tensors(&["y", "x"])),
            ]),
            "tensor `x` is in",
        ),
    ];
    for (directory, part) in cases {
        let message = Repository::open(directory.path()).unwrap_err().to_string();
        assert!(message.contains(part), "{part}: {message}");
        assert!(!message.contains('\n'), "{message}");
    }
}

#[test]
fn settings_are_read_or_named() {
    let directory = directory(&[]);
    let path = directory.path().join("config.json");
    std::fs::write(&path, r#"{"n": 3, "x": 1e-6, "s": "t", "o": {"k": "\u001b"}, "null": null}"#)
        .unwrap();
    let file = JsonFile::open(&path).unwrap();
    assert_eq!((file.size("n").unwrap(), file.f32("x").unwrap()), (3, 1e-6));
    assert_eq!((file.str("s").unwrap(), file.optional_f64("n").unwrap()), ("t", Some(3.0)));
    assert_eq!(file.optional_size("null").unwrap(), None);
    for (message, part) in [
        (file.size("x").unwrap_err(), "`x` is 1e-6, but must be a whole number"),
        (file.size("m").unwrap_err(), "`m` is missing"),
        (file.str("o").unwrap_err(), "`o` is {\"k\":\"\\\\u001b\"}, but must be a text"),
        (file.optional_bool("n").unwrap_err(), "must be true or false"),
        (file.object("n").unwrap_err(), "must be an object"),
    ] {
        let message = message.to_string();
        assert!(message.contains("config.json: ") && message.contains(part), "{message}");
    }
}

#[test]
fn only_what_runs_a_model_is_fetched() {
    let wanted = ["config.json", "model-00001-of-00002.safetensors", "chat_template.jinja"];
    let others =
        ["README.md", "pytorch_model.bin", "pytorch_model.bin.index.json", "onnx/config.json"];
    assert!(wanted.iter().all(|name| is_repository_file(name)));
    assert!(!others.iter().any(|name| is_repository_file(name)));
}
