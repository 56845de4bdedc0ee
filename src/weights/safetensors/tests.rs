//! Goal: a valid file is read exactly; any other is refused in one line, without a panic and
//! without a large allocation. Method: files written by hand, tampered with, cut at every byte.

use super::*;

/// A file of a header and the bytes behind it.
fn file(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), data].concat()
}

const TWO: &str = r#"{"__metadata__":{"format":"pt"},
    "b":{"dtype":"BF16","shape":[2,3],"data_offsets":[4,16]},
    "a":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}"#;

fn open(bytes: &[u8]) -> Result<Safetensors, RepositoryError> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.safetensors");
    std::fs::write(&path, bytes).unwrap();
    Safetensors::open(&path)
}

fn refusal(bytes: &[u8]) -> String {
    let message = open(bytes).unwrap_err().to_string();
    assert!(message.contains("model.safetensors: "), "{message}");
    assert!(!message.contains('\n') && message.len() < 600, "{message}");
    message
}

#[test]
fn a_valid_file_is_read_exactly() {
    let data: Vec<u8> = (0..16).collect();
    let file = open(&file(TWO, &data)).unwrap();
    let [a, b] = file.tensors() else { panic!("two tensors") };
    assert_eq!((a.name.as_str(), a.dtype, a.shape.as_slice()), ("a", ElementType::F32, &[][..]));
    assert_eq!(
        (b.name.as_str(), b.dtype, b.shape.as_slice()),
        ("b", ElementType::BF16, &[2, 3][..])
    );
    assert_eq!((a.num_values(), b.num_values(), b.num_bytes()), (1, 6, 12));
    let bytes = file.bytes(b);
    file.release_pages();
    drop(file);
    bytes.release();
    assert_eq!(bytes.as_ref(), &data[4..]);
}

#[test]
fn what_is_wrong_with_a_file_is_said_in_one_line() {
    let one = |tensor: &str| file(&format!(r#"{{"x":{tensor}}}"#), &[0; 8]);
    let cases: [(Vec<u8>, &str); 18] = [
        (Vec::new(), "ends after 0 bytes, inside the length of the header"),
        (b"GGUF\x03\0\0\0\x01\x02".to_vec(), "not a safetensors file"),
        (b"\x03\0\0\0\0\0\0\0{}".to_vec(), "ends after 10 bytes, inside the header"),
        (vec![0xff; 64], "not a safetensors file"),
        ((1_u64 << 40).to_le_bytes().to_vec(), "not a safetensors file"),
        (file("[]", &[]), "its header cannot be read"),
        (file("{\"x\":\n\n1}", &[]), "its header cannot be read"),
        (one(r#"{"dtype":"F32","shape":[2]}"#), "missing field `data_offsets`"),
        (one(r#"{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}"#), "its header cannot be read"),
        (one(r#"{"dtype":"F4\u001b[2J","shape":[2],"data_offsets":[0,8]}"#), "the type F4\\u{1b}"),
        (one(r#"{"dtype":"F32","shape":[3],"data_offsets":[0,8]}"#), "values are 12 bytes"),
        (one(r#"{"dtype":"F32","shape":[2],"data_offsets":[8,0]}"#), "lies at 8 to 0"),
        (
            one(r#"{"dtype":"F64","shape":[4294967296,4294967296],"data_offsets":[0,8]}"#),
            "impossible shape",
        ),
        (one(r#"{"dtype":"F32","shape":[4],"data_offsets":[0,16]}"#), "inside tensor `x`"),
        (one(r#"{"dtype":"F32","shape":[1],"data_offsets":[0,4]}"#), "4 bytes belong to no tensor"),
        (one(r#"{"dtype":"F32","shape":[1],"data_offsets":[4,8]}"#), "a gap before tensor `x`"),
        (
            file(
                r#"{"x":{"dtype":"U8","shape":[6],"data_offsets":[0,6]},
                    "y":{"dtype":"U8","shape":[6],"data_offsets":[2,8]}}"#,
                &[0; 8],
            ),
            "tensors `x` and `y` overlap",
        ),
        (
            file(
                r#"{"x":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},
                    "x":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}}"#,
                &[0; 8],
            ),
            "tensor `x` appears twice",
        ),
    ];
    for (bytes, part) in cases {
        let message = refusal(&bytes);
        assert!(message.contains(part), "{part}: {message}");
    }
}

#[test]
fn a_file_cut_anywhere_is_refused() {
    let whole = file(TWO, &[0; 16]);
    for len in 0..whole.len() {
        refusal(&whole[..len]);
    }
    refusal(&[&whole[..], &[0]].concat());
}
