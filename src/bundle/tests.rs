//! What is packed comes back, and nothing else does.

use std::fs;
use std::io::Cursor;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use super::manifest::{License, Model, Program, path_problem};
use super::*;

/// Something done to a manifest.
type Change = fn(&mut serde_json::Value);

fn manifest() -> Manifest {
    Manifest {
        format_version: manifest::FORMAT_VERSION,
        created: "2027-01-31T12:00:00Z".to_owned(),
        program: Program {
            version: "1.2.3".to_owned(),
            license: "Apache-2.0".to_owned(),
            path: Some("qwen-server".to_owned()),
        },
        model: Model {
            name: "m".to_owned(),
            quantization: "Q4_0".to_owned(),
            path: "model/m".to_owned(),
            license: License::default(),
        },
        files: Vec::new(),
    }
}

/// A bundle of a program and two files, one of them empty.
fn bundle() -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let contents = [("qwen-server", "#!"), ("model/m/a", ""), ("model/m/b", "weights")];
    let sources = contents.map(|(path, text)| {
        let file = folder.path().join(path.replace('/', "-"));
        fs::write(&file, text).unwrap();
        Source { file, path: path.to_owned() }
    });
    let mut output = Cursor::new(Vec::new());
    let mut num_bytes = 0;
    pack(&mut output, &mut manifest(), &sources, &mut |n| num_bytes += n).unwrap();
    assert_eq!(num_bytes, 9);
    output.into_inner()
}

fn check(archive: &[u8]) -> Result<Unpacked, BundleError> {
    unpack(&mut &*archive, None, &mut |_| {})
}

fn entries(directory: &Path) -> usize {
    fs::read_dir(directory).unwrap().count()
}

#[test]
fn what_is_packed_comes_back() {
    let folder = tempfile::tempdir().unwrap();
    let to = folder.path().join("to");
    let archive = bundle();
    let unpacked = install(&mut &archive[..], &to, &mut |_| {}).unwrap();
    assert_eq!(unpacked.manifest.model, manifest().model);
    assert_eq!(fs::read(to.join("model/m/b")).unwrap(), b"weights");
    assert_eq!(fs::read(to.join("model/m/a")).unwrap(), b"");
    let mode = |name: &str| fs::metadata(to.join(name)).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode("qwen-server"), 0o755);
    assert_eq!(mode("model/m/b") & 0o111, 0);
    let text = fs::read(to.join(MANIFEST)).unwrap();
    assert_eq!(hex(Sha256::new_with_prefix(&text)), unpacked.manifest_sha256);
    assert_eq!(entries(folder.path()), 1);
}

/// Damage anywhere is noticed: in contents, headers, fillings and the manifest itself.
#[test]
fn no_byte_can_change_or_be_missing() {
    let archive = bundle();
    assert!(check(&archive).is_ok());
    for index in 0..archive.len() {
        let mut damaged = archive.clone();
        damaged[index] ^= 1;
        assert!(check(&damaged).is_err(), "byte {index}");
    }
    for len in 0..archive.len() {
        assert!(check(&archive[..len]).is_err(), "{len} bytes");
    }
    assert!(check(&[&archive[..], &[0; 700]].concat()).is_ok());
    assert!(check(&[&archive[..], b"x"].concat()).is_err());
}

#[test]
fn a_bundle_that_is_not_whole_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let archive = bundle();
    let cut = &archive[..archive.len() - 1];
    let error = install(&mut &*cut, &folder.path().join("to"), &mut |_| {}).unwrap_err();
    assert!(matches!(error, BundleError::Truncated(_)), "{error}");
    assert_eq!(entries(folder.path()), 0);
    let empty = folder.path().join("empty");
    fs::create_dir(&empty).unwrap();
    assert!(install(&mut &*cut, &empty, &mut |_| {}).is_err());
    assert_eq!((entries(folder.path()), entries(&empty)), (1, 0));
}

#[test]
fn only_an_empty_directory_is_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let (empty, full) = (folder.path().join("empty"), folder.path().join("full"));
    fs::create_dir(&empty).unwrap();
    fs::set_permissions(&empty, fs::Permissions::from_mode(0o750)).unwrap();
    fs::create_dir(&full).unwrap();
    fs::write(full.join("mine"), "x").unwrap();
    let archive = bundle();
    let into = |directory: &Path| install(&mut &archive[..], directory, &mut |_| {});
    assert!(into(&empty).is_ok());
    assert_eq!(fs::metadata(&empty).unwrap().permissions().mode() & 0o777, 0o750);
    assert!(matches!(into(&full), Err(BundleError::NotEmpty(_))));
    assert_eq!(entries(&full), 1);
    assert!(matches!(into(Path::new("/proc/self/nothing/x")), Err(BundleError::Io { .. })));
    assert!(into(Path::new("/")).is_err());
    let staging = folder.path().join("new.partial");
    fs::create_dir(&staging).unwrap();
    assert!(matches!(into(&folder.path().join("new")), Err(BundleError::Leftover(_))));
    assert!(staging.is_dir());
}

#[test]
fn manifests_that_make_no_sense_are_refused() {
    let parse = |change: Change| {
        let mut value = serde_json::to_value(check(&bundle()).unwrap().manifest).unwrap();
        change(&mut value);
        Manifest::parse(value.to_string().as_bytes()).map_err(|error| error.to_string())
    };
    assert!(parse(|_| {}).is_ok());
    // Of a newer version nothing else is read.
    let newer = parse(|value| *value = serde_json::json!({"format_version": 2})).unwrap_err();
    assert!(newer.contains("has format 2"), "{newer}");
    let cases: [(Change, &str); 7] = [
        (|value| value["files"][1]["path"] = "../x".into(), "leads out of the directory"),
        (|value| value["files"][1]["path"] = "/x".into(), "is absolute"),
        (|value| value["files"][1]["path"] = MANIFEST.into(), "names `manifest.json` twice"),
        (|value| value["files"][2]["path"] = "model/m/a".into(), "names `model/m/a` twice"),
        (|value| value["files"][0]["sha256"] = "AB".into(), "no SHA-256 of `qwen-server`"),
        (|value| value["program"]["path"] = "model/m".into(), "the program that it names"),
        (|value| value["model"]["path"] = "model/".into(), "the model that it names"),
    ];
    for (change, message) in cases {
        let error = parse(change).unwrap_err();
        assert!(error.contains(message), "{error}");
    }
    assert!(Manifest::parse(b"{}").is_err());
}

#[test]
fn paths_stay_inside() {
    for path in ["a", "model/a b.gguf", "..a/b..", "é/…"] {
        assert_eq!(path_problem(path), None, "{path}");
    }
    for path in ["", "/", "/a", "..", "a/../b", "a//b", "./a", "a/", "a\\b", "a\nb", "a\0"] {
        assert!(path_problem(path).is_some(), "{path}");
    }
}

#[test]
fn names_that_do_not_fit_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("x");
    fs::write(&file, "x").unwrap();
    for path in ["../x".to_owned(), format!("model/{}", "x".repeat(101))] {
        let source = Source { file: file.clone(), path };
        let output = &mut Cursor::new(Vec::new());
        let error = pack(output, &mut manifest(), &[source], &mut |_| {}).unwrap_err();
        assert!(matches!(error, BundleError::Name { .. }), "{error}");
    }
}

/// Goal: a file that grows or shrinks while it is read is no silent success. Method: a file whose
/// size the system does not know.
#[test]
fn a_file_of_another_size_than_was_said_is_refused() {
    let source = Source { file: "/proc/self/status".into(), path: "model/m".to_owned() };
    let output = &mut Cursor::new(Vec::new());
    let error = pack(output, &mut manifest(), &[source], &mut |_| {}).unwrap_err();
    assert!(matches!(error, BundleError::Changed(_)), "{error}");
}
