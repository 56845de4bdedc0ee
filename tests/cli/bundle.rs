//! A model from one machine to another that has no network.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Output;

use serde_json::Value;

use super::{assert_fails, command, run, stderr, stdout};

const BLOCK: usize = 512;

fn tiny(name: &str) -> String {
    format!("{}/models/tiny/{name}", env!("CARGO_MANIFEST_DIR"))
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A bundle of a tiny model without the program.
fn bundle(folder: &Path, model: &str) -> PathBuf {
    let archive = folder.join("bundle.tar");
    let output = run(&["bundle", "--model", &tiny(model), text(&archive), "--without-binary"]);
    assert!(output.status.success(), "{}", stderr(&output));
    archive
}

fn unbundle(archive: &Path, to: &Path) -> Output {
    run(&["unbundle", text(archive), "--to", text(to)])
}

/// The value of `--model` in the command that `unbundle` prints last.
fn model_of(output: &Output) -> String {
    assert!(output.status.success(), "{}", stderr(output));
    let lines = stdout(output);
    let start = lines.lines().last().unwrap();
    start.split(" --model ").nth(1).unwrap().split(' ').next().unwrap().to_owned()
}

/// What `inspect` says of a model, without where its files are.
fn inspection(model: &str) -> Value {
    let output = run(&["inspect", "--no-speed", "--json", "--tensors", model]);
    assert!(output.status.success(), "{}", stderr(&output));
    let mut report: Value = serde_json::from_str(&stdout(&output)).unwrap();
    report["files"].take();
    report
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    let mut names: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// A member of an archive, to be spoilt.
#[derive(Clone)]
struct Member {
    header: Vec<u8>,
    content: Vec<u8>,
}

impl Member {
    fn rename(&mut self, name: &str) {
        self.header[..100].fill(0);
        self.header[..name.len()].copy_from_slice(name.as_bytes());
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = self.header.clone();
        bytes[124..136].copy_from_slice(format!("{:011o}\0", self.content.len()).as_bytes());
        bytes[148..156].fill(b' ');
        let sum: u32 = bytes.iter().map(|&byte| u32::from(byte)).sum();
        bytes[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        bytes.extend(&self.content);
        bytes.resize(bytes.len().next_multiple_of(BLOCK), 0);
        bytes
    }
}

fn members(archive: &[u8]) -> Vec<Member> {
    let (mut members, mut rest) = (Vec::new(), archive);
    while rest[0] != 0 {
        let (header, after) = rest.split_at(BLOCK);
        let size = std::str::from_utf8(&header[124..135]).unwrap();
        let size = usize::from_str_radix(size, 8).unwrap();
        members.push(Member { header: header.to_vec(), content: after[..size].to_vec() });
        rest = &after[size.next_multiple_of(BLOCK)..];
    }
    members
}

fn archive(members: &[Member]) -> Vec<u8> {
    let mut bytes: Vec<u8> = members.iter().flat_map(Member::bytes).collect();
    bytes.resize(bytes.len() + 2 * BLOCK, 0);
    bytes
}

#[test]
fn a_model_arrives_as_it_left() {
    for (model, files, license) in
        [("mixed.gguf", 1, "licence unknown"), ("hf-sharded", 9, "licence unknown")]
    {
        let folder = tempfile::tempdir().unwrap();
        let archive = bundle(folder.path(), model);
        let check = run(&["unbundle", text(&archive), "--verify"]);
        assert!(check.status.success(), "{}", stderr(&check));
        assert!(stdout(&check).contains(license), "{}", stdout(&check));
        assert_eq!(names(folder.path()), ["bundle.tar"]);

        let to = folder.path().join("a b");
        let output = unbundle(&archive, &to);
        assert!(output.status.success(), "{}", stderr(&output));
        assert!(stdout(&output).lines().last().unwrap().contains(" --model '"));
        let to = folder.path().join("installed");
        let path = model_of(&unbundle(&archive, &to));
        assert!(path.starts_with(text(&to)), "{path}");
        assert_eq!(inspection(&path), inspection(&tiny(model)));
        assert_eq!(names(&to), ["manifest.json", "model"]);
        let manifest: Value =
            serde_json::from_slice(&fs::read(to.join("manifest.json")).unwrap()).unwrap();
        assert_eq!(manifest["files"].as_array().unwrap().len(), files);
        assert_eq!(manifest["program"]["version"], env!("CARGO_PKG_VERSION"));
        assert_eq!(manifest["program"]["path"], Value::Null);
    }
}

#[test]
fn licences_travel_with_a_repository_and_strangers_do_not() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("my-model");
    fs::create_dir(&model).unwrap();
    for name in names(Path::new(&tiny("hf-bf16"))) {
        fs::copy(tiny(&format!("hf-bf16/{name}")), model.join(name)).unwrap();
    }
    for name in ["LICENSE", "diary.txt", "optimizer.pt"] {
        fs::write(model.join(name), name).unwrap();
    }
    let archive = folder.path().join("bundle.tar");
    let output = run(&["bundle", "--model", text(&model), text(&archive), "--without-binary"]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(stdout(&output).contains("(model/my-model/LICENSE)"), "{}", stdout(&output));
    let to = folder.path().join("installed");
    model_of(&unbundle(&archive, &to));
    let arrived = names(&to.join("model/my-model"));
    assert!(arrived.contains(&"LICENSE".to_owned()) && arrived.len() == 6, "{arrived:?}");
}

/// Goal: a machine with nothing but the archive gets a server. Method: the program that arrived
/// is run, and looks at the model that arrived.
#[test]
fn the_program_travels_along() {
    let folder = tempfile::tempdir().unwrap();
    let archive = folder.path().join("bundle.tar");
    let output = run(&["bundle", "--model", &tiny("mixed.gguf"), text(&archive)]);
    assert!(output.status.success(), "{}", stderr(&output));
    let digest = stdout(&output).lines().last().unwrap().to_owned();
    assert!(digest.starts_with("manifest sha256 "), "{digest}");
    let to = folder.path().join("installed");
    let output = unbundle(&archive, &to);
    let model = model_of(&output);
    assert!(stdout(&output).contains(&digest), "{}", stdout(&output));
    let program = to.join("qwen-server");
    let start = format!("\n{} serve --model {model} ", text(&program));
    assert!(stdout(&output).contains(&start), "{}", stdout(&output));
    let version = std::process::Command::new(&program).arg("--version").output().unwrap();
    assert_eq!(stdout(&version), concat!("qwen-server ", env!("CARGO_PKG_VERSION"), "\n"));
    let inspected = std::process::Command::new(&program).args(["inspect", &model]).output();
    assert!(inspected.unwrap().status.success());
}

#[test]
fn nothing_is_overwritten_unasked() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("out.tar");
    let model = folder.path().join("m.gguf");
    fs::copy(tiny("mixed.gguf"), &model).unwrap();
    fs::write(&output, "mine").unwrap();
    let args = ["bundle", "--without-binary", "--model", text(&model)];
    let pack = |more: &[&str]| run(&[&args, more].concat());
    assert_fails(&pack(&[text(&output)]), "exists already");
    assert_eq!(fs::read(&output).unwrap(), b"mine");
    assert_fails(&pack(&[text(&model), "--force"]), "is one of the files to be packed");
    assert_fails(&pack(&[text(folder.path()), "--force"]), "is a directory");
    assert_fails(&pack(&[text(&folder.path().join("no/out.tar"))]), "No such file");
    assert!(pack(&[text(&output), "--force"]).status.success());
    assert_ne!(fs::read(&output).unwrap(), b"mine");
    assert_eq!(fs::read(&model).unwrap(), fs::read(tiny("mixed.gguf")).unwrap());
    assert_eq!(names(folder.path()), ["m.gguf", "out.tar"]);
}

#[test]
fn a_model_that_is_not_here_is_not_fetched() {
    let folder = tempfile::tempdir().unwrap();
    let output = command(&["bundle", "--model", "qwen2.5-7b-instruct"])
        .arg(folder.path().join("out.tar"))
        .env("HF_HOME", folder.path())
        // Whoever asks there gets an error of another kind.
        .env("HF_ENDPOINT", "http://127.0.0.1:1")
        .output()
        .unwrap();
    assert_fails(&output, "`qwen-server pull qwen2.5-7b-instruct` fetches it");
    assert_eq!(names(folder.path()), [""; 0]);
}

#[test]
fn damage_is_refused_and_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let whole = fs::read(bundle(folder.path(), "hf-sharded")).unwrap();
    let parts = members(&whole);
    assert_eq!(archive(&parts), whole);
    let spoilt = |spoil: fn(&mut Vec<Member>)| {
        let mut parts = parts.clone();
        spoil(&mut parts);
        archive(&parts)
    };
    let flipped = |index: usize| {
        let mut bytes = whole.clone();
        bytes[index] ^= 0x10;
        bytes
    };
    let cases: Vec<(Vec<u8>, &str)> = vec![
        (flipped(whole.len() / 2), "does not have its SHA-256"),
        (flipped(0), "is no bundle"),
        (whole[..whole.len() / 2].to_vec(), "the archive ends early, inside `model/hf-sharded/"),
        (whole[..whole.len() - 2 * BLOCK].to_vec(), "ends early, before its end"),
        (Vec::new(), "is no bundle"),
        (b"GGUF".repeat(BLOCK), "is no bundle"),
        (spoilt(|parts| parts[2].rename("../evil")), "`../evil`, which leads out"),
        (spoilt(|parts| parts[2].rename("/etc/evil")), "`/etc/evil`, which is absolute"),
        (spoilt(|parts| parts[2].header[156] = b'2'), "config.json` is a symbolic link"),
        (spoilt(|parts| parts[2].header[156] = b'1'), "config.json` is a hard link"),
        (spoilt(|parts| parts[2].header[156] = b'3'), "config.json` is a device"),
        (spoilt(|parts| parts[2].rename("model/more")), "does not name `model/more`"),
        (spoilt(|parts| parts.insert(3, parts[2].clone())), "config.json` is there twice"),
        (spoilt(|parts| parts.push(parts[0].clone())), "`manifest.json` is there twice"),
        (spoilt(|parts| parts.push(parts[2].clone())), "config.json` is there twice"),
        (spoilt(|parts| drop(parts.remove(2))), "config.json` is missing"),
        (spoilt(|parts| drop(parts.remove(parts.len() - 2))), "tokenizer_config.json` is missing"),
        (spoilt(|parts| drop(parts.pop())), "`manifest.sha256` is missing"),
        (spoilt(|parts| parts[2].content.push(b' ')), "config.json` has another size"),
        (spoilt(|parts| replace(parts, "_version\": 1,", "_version\": 2,")), "has format 2"),
        (spoilt(|parts| replace(parts, "BF16", "BF17")), "manifest.json is not what was written"),
        (spoilt(|parts| replace(parts, "model/hf", "../../hf")), "leads out of the directory"),
    ];
    let path = folder.path().join("spoilt.tar");
    for (bytes, message) in cases {
        fs::write(&path, bytes).unwrap();
        assert_fails(&unbundle(&path, &folder.path().join("to")), message);
        assert_fails(&run(&["unbundle", text(&path), "--verify"]), message);
        assert_eq!(names(folder.path()), ["bundle.tar", "spoilt.tar"]);
    }
}

/// Writes something else into the manifest.
fn replace(parts: &mut [Member], from: &str, to: &str) {
    let manifest = String::from_utf8(parts[0].content.clone()).unwrap();
    assert!(manifest.contains(from), "{manifest}");
    parts[0].content = manifest.replace(from, to).into_bytes();
}

#[test]
fn what_is_in_a_directory_stays() {
    let folder = tempfile::tempdir().unwrap();
    let archive = bundle(folder.path(), "mixed.gguf");
    assert_fails(&unbundle(&archive, folder.path()), "is not empty");
    assert_fails(&unbundle(&archive, &folder.path().join("no/dir")), "cannot find the directory");
    assert_fails(&unbundle(&folder.path().join("no.tar"), &folder.path().join("x")), "cannot read");
    let output = run(&["unbundle", text(&archive)]);
    assert_eq!(output.status.code(), Some(2));
    assert_eq!(names(folder.path()), ["bundle.tar"]);
}
