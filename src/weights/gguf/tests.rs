//! Goal: a valid file is read exactly; any other is refused in one line, without a panic and
//! without a large allocation. Method: files built by [`Writer`], tampered with by hand, by
//! truncation at every byte and at random.

use std::path::PathBuf;

use proptest::prelude::*;
use tempfile::TempDir;

use super::header::Header;
use super::writer::Writer;
use super::*;

fn tiny() -> Writer {
    Writer::new()
        .string("general.architecture", "qwen2")
        .u32("qwen2.block_count", 2)
        .f32("qwen2.attention.layer_norm_rms_epsilon", 1e-6)
        .raw("a.bool", 7, &[1])
        .raw("a.i64", 11, &(-5_i64).to_le_bytes())
        .raw("a.u16", 2, &7_u16.to_le_bytes())
        .strings("tokenizer.ggml.tokens", &["a", "", "Ġb", "语"])
        .i32s("tokenizer.ggml.token_type", &[1, 3, -1, 4])
        .bools("a.bools", &[true, false])
        .i32s("a.bits", &[0, 1, 1])
        .tensor("token_embd.weight", &[4, 2], 0, &[7; 32])
        .tensor("output.weight", &[32, 3], 8, &[9; 102])
        .tensor("half", &[5], 1, &[1; 10])
}

fn save(bytes: &[u8], name: &str) -> (TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join(name);
    std::fs::write(&path, bytes).unwrap();
    (directory, path)
}

/// The message for a file that must be refused.
fn refusal(bytes: &[u8]) -> String {
    let (_directory, path) = save(bytes, "model.gguf");
    let message = Gguf::open(&path).unwrap_err().to_string();
    assert!(message.contains("model.gguf"), "{message}");
    assert!(!message.contains('\n'), "{message}");
    assert!(message.len() < 600, "{message}");
    message
}

#[test]
fn a_valid_file_is_read_exactly() {
    let (_directory, path) = save(&tiny().build(), "model.gguf");
    let gguf = Gguf::open(&path).unwrap();
    assert_eq!(gguf.version(), 3);
    let metadata = gguf.metadata();
    assert_eq!(metadata.str("general.architecture").unwrap(), "qwen2");
    assert_eq!(metadata.u32("qwen2.block_count").unwrap(), 2);
    assert_eq!(metadata.u32("a.u16").unwrap(), 7);
    assert_eq!(metadata.f32("qwen2.attention.layer_norm_rms_epsilon").unwrap(), 1e-6);
    assert!(metadata.bool("a.bool").unwrap());
    assert_eq!(metadata.strings("tokenizer.ggml.tokens").unwrap(), ["a", "", "Ġb", "语"]);
    assert_eq!(metadata.i32s("tokenizer.ggml.token_type").unwrap(), [1, 3, -1, 4]);
    assert_eq!(metadata.bools("a.bools").unwrap(), [true, false]);
    assert_eq!(metadata.bools("a.bits").unwrap(), [false, true, true]);
    assert_eq!(metadata.f32s("tokenizer.ggml.token_type").unwrap(), [1.0, 3.0, -1.0, 4.0]);
    assert_eq!(metadata.optional("nothing", Metadata::str).unwrap(), None);
    assert_eq!(metadata.optional("a.u16", Metadata::u64).unwrap(), Some(7));

    let (info, bytes) = gguf.tensor("token_embd.weight").unwrap();
    assert_eq!((info.dtype, &info.shape[..]), (GgmlDType::F32, &[2, 4][..]));
    assert_eq!(bytes, [7; 32]);
    let (info, bytes) = gguf.tensor("output.weight").unwrap();
    assert_eq!((info.dtype, &info.shape[..], info.num_bytes), (GgmlDType::Q8_0, &[3, 32][..], 102));
    assert_eq!(bytes, [9; 102]);
    gguf.release_tensor(info);
    gguf.release_pages();
    assert_eq!(gguf.tensor("half").unwrap().1, [1; 10]);
    assert_eq!(gguf.tensors().count(), 3);
    let (_, shared) = gguf.shared_tensor("output.weight").unwrap();
    drop(gguf);
    assert_eq!(shared.as_ref(), [9; 102]);
}

#[test]
fn getters_name_the_key() {
    let (_directory, path) = save(&tiny().build(), "model.gguf");
    let gguf = Gguf::open(&path).unwrap();
    let metadata = gguf.metadata();
    for (error, parts) in [
        (metadata.u32("no.such").unwrap_err(), ["`no.such`", "missing"]),
        (metadata.u32("a.i64").unwrap_err(), ["`a.i64`", "-5"]),
        (metadata.u32("general.architecture").unwrap_err(), ["`general.architecture`", "a string"]),
        (metadata.str("a.u16").unwrap_err(), ["`a.u16`", "the number 7"]),
        (metadata.bool("a.u16").unwrap_err(), ["`a.u16`", "true or false"]),
        (metadata.bools("a.u16").unwrap_err(), ["`a.u16`", "array of true and false"]),
        (
            metadata.bools("tokenizer.ggml.token_type").unwrap_err(),
            ["token_type", "true and false"],
        ),
        (metadata.strings("a.u16").unwrap_err(), ["`a.u16`", "array of strings"]),
        (metadata.u32s("tokenizer.ggml.token_type").unwrap_err(), ["token_type", "from zero"]),
        (metadata.i32s("tokenizer.ggml.tokens").unwrap_err(), ["tokens", "array of 4 string"]),
        (gguf.tensor("blk.0.attn_q.weight").unwrap_err(), ["`blk.0.attn_q.weight`", "missing"]),
    ] {
        let message = error.to_string();
        for part in parts {
            assert!(message.contains(part), "{message} lacks {part}");
        }
    }
}

/// Version 2 has the same layout; other versions and byte orders are refused by name.
#[test]
fn versions_and_byte_order() {
    let mut bytes = tiny().build();
    bytes[4] = 2;
    assert_eq!(Header::parse(&bytes).unwrap().version, 2);
    bytes[4] = 1;
    assert!(refusal(&bytes).contains("version 1"));
    bytes[4] = 77;
    assert!(refusal(&bytes).contains("version 77"));
    bytes[4..8].copy_from_slice(&3_u32.to_be_bytes());
    assert!(refusal(&bytes).contains("big-endian"));
    bytes[..4].copy_from_slice(b"FUGG");
    assert!(refusal(&bytes).contains("big-endian"));
    assert!(refusal(b"").contains("empty"));
    assert!(refusal(b"GG").contains("`GG`"));
    assert!(refusal(b"\x80\x02\nq").contains("`\\x80\\x02\\nq`"));
    assert!(refusal(b"GGUF").contains("ends after 4 bytes"));
}

/// Numbers that would be ruinous if they were believed.
#[test]
fn huge_numbers_are_refused() {
    let huge = 1_u64 << 60;
    for position in [8, 16] {
        let mut bytes = tiny().build();
        bytes[position..position + 8].copy_from_slice(&huge.to_le_bytes());
        assert!(refusal(&bytes).contains(&huge.to_string()));
        bytes[position..position + 8].copy_from_slice(&60_000_u64.to_le_bytes());
        assert!(refusal(&bytes).contains("ends after"));
    }
    let array = |element: u32, len: u64| {
        [&element.to_le_bytes()[..], &len.to_le_bytes(), &[0; 64]].concat()
    };
    for element in [0, 5, 8, 10] {
        assert!(refusal(&Writer::new().raw("k", 9, &array(element, huge)).build()).contains("`k`"));
        let message = refusal(&Writer::new().raw("k", 9, &array(element, 1 << 22)).build());
        assert!(message.contains("ends after"), "{message}");
    }
    let message = refusal(&Writer::new().raw("k", 8, &huge.to_le_bytes()).build());
    assert!(message.contains("`k`"), "{message}");
    let message = refusal(&Writer::new().raw("k", 8, &u64::MAX.to_le_bytes()).build());
    assert!(message.contains("`k`"), "{message}");
    for dimensions in [&[huge, huge][..], &[u64::MAX, 1], &[1 << 62, 8], &[huge]] {
        let message = refusal(&Writer::new().tensor("t", dimensions, 0, &[0; 64]).build());
        assert!(message.contains("`t`"), "{message}");
    }
    for offset in [huge, u64::MAX - 31, 64] {
        let file = Writer::new().tensor_at("t", &[8], 0, (Some(offset), &[0; 32])).build();
        assert!(refusal(&file).contains("`t`"));
    }
}

#[test]
fn broken_rules_are_named() {
    let nested = [&9_u32.to_le_bytes()[..], &1_u64.to_le_bytes(), &[0; 64]].concat();
    let not_utf8 = [&2_u64.to_le_bytes()[..], &[0xff, 0xfe]].concat();
    let hostile = format!("a\n\u{1b}[2J{}", "x".repeat(10_000));
    let f32s = |count: usize| vec![0; 4 * count];
    for (file, part) in [
        (Writer::new().u32("k", 1).u32("k", 2), "`k` appears twice"),
        (Writer::new().raw("k", 9, &nested), "unsupported type 9"),
        (Writer::new().raw("k", 13, &[0; 64]), "unknown type 13"),
        (Writer::new().raw("k", 7, &[2]), "neither true nor false"),
        (Writer::new().raw("k", 8, &not_utf8), "not valid UTF-8"),
        (Writer::new().string(&hostile, "").u32(&hostile, 1), "a\\n\\u{1b}[2J"),
        (Writer::new().u32("general.alignment", 0), "power of two"),
        (Writer::new().u32("general.alignment", 48), "power of two"),
        (Writer::new().u32("general.alignment", 1), "power of two"),
        (Writer::new().u32("general.alignment", 1 << 31), "power of two"),
        (Writer::new().string("general.alignment", "32"), "not an unsigned number"),
        (Writer::new().tensor("t", &[], 0, &[]), "0 dimensions"),
        (Writer::new().tensor("t", &[1; 5], 0, &f32s(1)), "5 dimensions"),
        (Writer::new().tensor("t", &[4, 0], 0, &[]), "empty dimension"),
        (Writer::new().tensor("t", &[33], 8, &[0; 68]), "multiple of 32"),
        (Writer::new().tensor("t", &[256], 16, &[0; 66]), "IQ2_XXS"),
        (Writer::new().tensor("t", &[256], 4, &[0; 66]), "number 4"),
        (Writer::new().tensor("t", &[1], 0, &f32s(1)).tensor("t", &[1], 0, &f32s(1)), "twice"),
        (Writer::new().tensor_at("t", &[1], 0, (Some(16), &f32s(20))), "multiple of 32"),
        (
            Writer::new().tensor("a", &[16], 0, &f32s(16)).tensor_at(
                "b",
                &[8],
                0,
                (Some(32), &f32s(8)),
            ),
            "`a` and `b` overlap",
        ),
    ] {
        let message = refusal(&file.build());
        assert!(message.contains(part), "{message} lacks {part}");
        assert!(!message.contains('\u{1b}'));
    }
}

/// Wherever the file is cut, it is refused; only whole tensors' padding may be missing.
#[test]
fn truncation_at_every_byte_is_refused() {
    let bytes = tiny().build();
    let last_needed = Header::parse(&bytes).unwrap().tensors[2].range.end;
    for len in 0..bytes.len() {
        let parsed = Header::parse(&bytes[..len]);
        assert_eq!(parsed.is_ok(), last_needed <= len, "cut after {len} bytes");
    }
    assert!(refusal(&bytes[..last_needed - 1]).contains("inside tensor `half`"));
}

#[test]
fn missing_files_and_directories_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let message = Gguf::open(&directory.path().join("no.gguf")).unwrap_err().to_string();
    assert!(message.contains("no.gguf: cannot read the file"), "{message}");
    let message = Gguf::open(directory.path()).unwrap_err().to_string();
    assert!(message.contains("not a regular file"), "{message}");
}

fn part(number: u32, count: u32, tensor: &str) -> Vec<u8> {
    Writer::new()
        .raw("split.no", 2, &(number as u16).to_le_bytes())
        .raw("split.count", 2, &(count as u16).to_le_bytes())
        .raw("split.tensors.count", 5, &3_i32.to_le_bytes())
        .string("general.architecture", if number == 0 { "qwen2" } else { "other" })
        .tensor(tensor, &[2], 0, &[number as u8; 8])
        .build()
}

#[test]
fn split_models_open_from_any_part() {
    let directory = tempfile::tempdir().unwrap();
    let path = |number: usize| directory.path().join(format!("m-{number:05}-of-00003.gguf"));
    for (number, name) in ["a", "b", "c"].into_iter().enumerate() {
        std::fs::write(path(number + 1), part(number as u32, 3, name)).unwrap();
    }
    for number in 1..=3 {
        let gguf = Gguf::open(&path(number)).unwrap();
        assert_eq!(gguf.metadata().str("general.architecture").unwrap(), "qwen2");
        assert_eq!(gguf.tensor("a").unwrap().1, [0; 8]);
        assert_eq!(gguf.tensor("c").unwrap().1, [2; 8]);
        assert_eq!(gguf.paths().count(), 3);
        gguf.release_pages();
    }

    let message = |expected: &str| {
        let message = Gguf::open(&path(1)).unwrap_err().to_string();
        assert!(message.contains(expected), "{message}");
    };
    std::fs::write(path(3), part(2, 3, "a")).unwrap();
    message("tensor `a` is in another part too");
    std::fs::write(path(3), part(1, 3, "c")).unwrap();
    message("does not say that it is part 3 of 3");
    std::fs::write(path(3), Writer::new().build()).unwrap();
    message("3 tensors, but its parts hold 2");
    std::fs::remove_file(path(3)).unwrap();
    message("part 3 of 3 of this split model is missing");
    std::fs::write(path(1), part(1, 3, "a")).unwrap();
    message("named as the first part");
    std::fs::write(path(1), part(0, 60_000, "a")).unwrap();
    message("60000 parts");
    let (_directory, other) = save(&part(0, 3, "a"), "renamed.gguf");
    let message = Gguf::open(&other).unwrap_err().to_string();
    assert!(message.contains("is not named like"), "{message}");
}

#[test]
fn part_names() {
    assert_eq!(part_of(Path::new("x/m-00002-of-00003.gguf")), Some((2, 3)));
    for name in ["m-2-of-3.gguf", "m-00004-of-00003.gguf", "m-00000-of-00003.gguf", "m.gguf"] {
        assert_eq!(part_of(Path::new(name)), None);
    }
}

/// Parses, and when that succeeds, touches everything a parsed header promises.
fn exercise(bytes: &[u8]) {
    match Header::parse(bytes) {
        Ok(header) => {
            for tensor in &header.tensors {
                assert!(tensor.range.end <= bytes.len());
                let num_values: usize = tensor.shape.iter().product();
                assert!(num_values <= 4 * bytes.len());
            }
            let (_directory, path) = save(bytes, "m.gguf");
            let Ok(gguf) = Gguf::open(&path) else { return };
            for (key, value) in gguf.metadata().iter() {
                assert!(!value.to_string().contains('\n'));
                let _ = gguf.metadata().strings(key);
                let _ = gguf.metadata().i32s(key);
                let _ = gguf.metadata().f32s(key);
                let _ = gguf.metadata().u32(key);
            }
            for tensor in gguf.tensors() {
                assert_eq!(gguf.tensor(&tensor.name).unwrap().1.len(), tensor.num_bytes);
            }
        }
        Err(problem) => {
            let message = problem.to_string();
            assert!(!message.contains('\n') && message.len() < 600, "{message}");
        }
    }
}

proptest! {
    #[test]
    fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
        exercise(&bytes);
        exercise(&[&b"GGUF\x03\0\0\0"[..], &bytes].concat());
    }

    #[test]
    fn small_random_counts_never_panic(
        counts in (0_u64..4, 0_u64..4),
        bytes in proptest::collection::vec(prop_oneof![Just(0_u8), 0_u8..14, any::<u8>()], 0..400),
    ) {
        let start = [&counts.0.to_le_bytes()[..], &counts.1.to_le_bytes()].concat();
        exercise(&[&b"GGUF\x03\0\0\0"[..], &start, &bytes].concat());
    }

    #[test]
    fn tampered_files_never_panic(
        flips in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        cut in any::<prop::sample::Index>(),
        is_cut in any::<bool>(),
    ) {
        let mut bytes = tiny().build();
        for (index, value) in flips {
            let index = index.index(bytes.len());
            bytes[index] = value;
        }
        if is_cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        exercise(&bytes);
    }

    #[test]
    fn tampered_numbers_never_panic(
        index in any::<prop::sample::Index>(),
        number in prop_oneof![any::<u64>(), (0_u32..64).prop_map(|shift| 1_u64 << shift)],
    ) {
        let mut bytes = tiny().build();
        let index = index.index(bytes.len() - 8);
        bytes[index..index + 8].copy_from_slice(&number.to_le_bytes());
        exercise(&bytes);
    }
}
