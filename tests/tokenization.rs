//! Tokenisation against Hugging Face tokenizers, id for id.
//!
//! Method: goldens under `models/qwen2.5`, written by `scripts/gen_tokenizer_goldens.py`; a small
//! tokenizer for a clean clone, the full vocabulary from the real model that
//! `QWEN_SERVER_TEST_MODEL` names, and the whole pipeline of the `tokenizers` crate on random text.

#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

use std::fs::File;
use std::io::{BufReader, Write};
use std::sync::{Arc, LazyLock};

use candle_core::quantized::gguf_file::{Content, Value};
use proptest::prelude::*;
use qwen_server::device::thread_clock::ThreadClock;
use qwen_server::text::{IncrementalDetokenizer, SpecialTokens, Tokenizer, TokenizerSpec};
use serde::Deserialize;

const SMALL_TOKENIZER: &str = include_str!("../models/qwen2.5/small_tokenizer.json");

#[derive(Deserialize)]
struct Mixed {
    text: String,
    ids: Vec<u32>,
    plain_ids: Vec<u32>,
    small_ids: Vec<u32>,
    small_plain_ids: Vec<u32>,
    decoded: String,
    decoded_skipping: String,
}

fn mixed() -> Vec<Mixed> {
    serde_json::from_str(include_str!("../models/qwen2.5/mixed_tokenization.json")).unwrap()
}

#[derive(Deserialize)]
struct Reference {
    text: Option<String>,
    ids: Option<Vec<u32>>,
}

/// The tokenizer of the real model, or `None` with a printed reason where none is given.
fn real_tokenizer() -> Option<Arc<Tokenizer>> {
    static REAL: LazyLock<Option<Arc<Tokenizer>>> = LazyLock::new(|| {
        let path = std::env::var_os("QWEN_SERVER_TEST_MODEL")?;
        let file = File::open(&path).expect("QWEN_SERVER_TEST_MODEL must be readable");
        let spec = spec_of_gguf(BufReader::new(file));
        Some(Arc::new(Tokenizer::from_spec(spec).unwrap()))
    });
    if REAL.is_none() {
        // Past the capture of test output, so that a skipped check is always seen.
        let mut stderr = std::io::stderr();
        writeln!(stderr, "skipped: QWEN_SERVER_TEST_MODEL is not set").unwrap();
    }
    REAL.clone()
}

fn spec_of_gguf(mut file: BufReader<File>) -> TokenizerSpec {
    let mut content = Content::read(&mut file).expect("QWEN_SERVER_TEST_MODEL must be GGUF");
    let mut array = |key: &str| match content.metadata.remove(key) {
        Some(Value::Array(values)) => values,
        other => panic!("{key}: {other:?}"),
    };
    let texts = |values: Vec<Value>| -> Vec<String> {
        values.iter().map(|value| value.to_string().unwrap().clone()).collect()
    };
    TokenizerSpec {
        tokens: texts(array("tokenizer.ggml.tokens")),
        merges: texts(array("tokenizer.ggml.merges")),
        token_types: array("tokenizer.ggml.token_type")
            .iter()
            .map(|value| value.to_i32().unwrap())
            .collect(),
        pre: content.metadata["tokenizer.ggml.pre"].to_string().unwrap().clone(),
    }
}

fn small_tokenizer() -> Arc<Tokenizer> {
    static SMALL: LazyLock<Arc<Tokenizer>> =
        LazyLock::new(|| Arc::new(Tokenizer::from_json(SMALL_TOKENIZER.as_bytes()).unwrap()));
    SMALL.clone()
}

/// What a GGUF file made from the small tokenizer would hold: padding, and the visible added tokens
/// that look like control tokens marked as such.
fn small_spec() -> TokenizerSpec {
    let file: serde_json::Value = serde_json::from_str(SMALL_TOKENIZER).unwrap();
    let vocab = file["model"]["vocab"].as_object().unwrap();
    let mut spec = TokenizerSpec { pre: "qwen2".to_owned(), ..Default::default() };
    spec.tokens = vocab.keys().cloned().collect();
    spec.token_types = vec![1; spec.tokens.len()];
    for added in file["added_tokens"].as_array().unwrap() {
        let content = added["content"].as_str().unwrap().to_owned();
        spec.token_types.push(if content.starts_with("<|") { 3 } else { 4 });
        spec.tokens.push(content);
    }
    for _ in 0..7 {
        spec.tokens.push(format!("[PAD{}]", spec.tokens.len()));
        spec.token_types.push(5);
    }
    let merges = file["model"]["merges"].as_array().unwrap();
    spec.merges = merges.iter().map(|merge| merge.as_str().unwrap().to_owned()).collect();
    spec
}

fn assert_ids(tokenizer: &Tokenizer, text: &str, expected: &[u32], expected_plain: &[u32]) {
    assert_eq!(tokenizer.encode(text).unwrap(), expected, "{text:?}");
    assert_eq!(tokenizer.encode_plain(text).unwrap(), expected_plain, "plain {text:?}");
}

#[test]
fn small_tokenizer_equals_tokenizers() {
    let tokenizer = small_tokenizer();
    for case in mixed() {
        assert_ids(&tokenizer, &case.text, &case.small_ids, &case.small_plain_ids);
        assert_eq!(tokenizer.decode(&case.small_ids, SpecialTokens::Keep), case.decoded);
        assert_eq!(tokenizer.decode(&case.small_ids, SpecialTokens::Skip), case.decoded_skipping);
    }
}

#[test]
fn gguf_metadata_and_tokenizer_file_give_the_same_tokenizer() {
    let (from_spec, from_json) = (Tokenizer::from_spec(small_spec()).unwrap(), small_tokenizer());
    assert_eq!(from_spec.vocab_size(), from_json.vocab_size() + 7);
    for case in mixed() {
        assert_ids(&from_spec, &case.text, &case.small_ids, &case.small_plain_ids);
        assert_eq!(from_spec.decode(&case.small_ids, SpecialTokens::Skip), case.decoded_skipping);
    }
    for id in 0..from_spec.vocab_size() as u32 {
        assert_eq!(from_spec.token_bytes(id), from_json.token_bytes(id));
        assert_eq!(from_spec.is_special(id), from_json.is_special(id));
    }
}

#[test]
fn full_vocabulary_equals_the_reference() {
    let Some(tokenizer) = real_tokenizer() else { return };
    for json in [
        include_str!("../models/qwen2.5/tokenization.json"),
        include_str!("../models/qwen2.5/chat_templates.json"),
        include_str!("../models/qwen2.5/template_goldens.json"),
    ] {
        let cases: Vec<Reference> = serde_json::from_str(json).unwrap();
        for case in cases {
            let (Some(text), Some(ids)) = (case.text, case.ids) else { continue };
            assert_eq!(tokenizer.encode(&text).unwrap(), ids, "{text:?}");
        }
    }
}

fn assert_full(tokenizer: &Arc<Tokenizer>, cases: &[Mixed]) {
    for case in cases {
        assert_ids(tokenizer, &case.text, &case.ids, &case.plain_ids);
        for (special_tokens, expected) in
            [(SpecialTokens::Keep, &case.decoded), (SpecialTokens::Skip, &case.decoded_skipping)]
        {
            assert_eq!(&tokenizer.decode(&case.ids, special_tokens), expected);
            let mut detokenizer = IncrementalDetokenizer::new(tokenizer.clone(), special_tokens);
            let mut text: String = case.ids.iter().map(|&id| detokenizer.push(id)).collect();
            text += &detokenizer.finish();
            assert_eq!(&text, expected);
        }
    }
}

#[test]
fn full_vocabulary_equals_tokenizers_on_mixed_text() {
    let Some(tokenizer) = real_tokenizer() else { return };
    assert_full(&tokenizer, &mixed());
    // A larger comparison by hand: more texts in the same form, written with `--random`.
    if let Some(path) = std::env::var_os("QWEN_SERVER_TEST_TOKENIZATION") {
        let cases: Vec<Mixed> = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        assert_full(&tokenizer, &cases);
        println!("{} texts are equal", cases.len());
    }
}

#[test]
fn full_vocabulary_hides_exactly_the_official_special_tokens() {
    let Some(tokenizer) = real_tokenizer() else { return };
    let special: Vec<u32> =
        (0..tokenizer.vocab_size() as u32).filter(|&id| tokenizer.is_special(id)).collect();
    assert_eq!(special, (151_643..=151_656).collect::<Vec<u32>>());
    assert_eq!(tokenizer.id_of("<|im_end|>"), Some(151_645));
    assert_eq!(tokenizer.id_of("<tool_call>"), Some(151_657));
    assert_eq!(tokenizer.token_bytes(151_664), Some(b"<|file_sep|>".as_slice()));
    assert_eq!(tokenizer.token_bytes(151_665), None);
}

// Goal: the time to encode grows with the length of the text, not with its square.
// Method: shapes that hurt backtracking patterns and merge loops; eightfold length may take at most
// forty times as long, which a square would exceed by far.
#[test]
fn long_texts_take_linear_time() {
    let tokenizer = small_tokenizer();
    // What others do on this machine is not counted.
    let Some(clock) = ThreadClock::of_this_thread() else { return };
    let seconds = |text: &str| {
        let timed = || {
            let seconds = || clock.elapsed().expect("this thread computes").as_secs_f64();
            let started = seconds();
            tokenizer.encode(text).unwrap();
            seconds() - started
        };
        (0..3).map(|_| timed()).fold(f64::INFINITY, f64::min)
    };
    for unit in [
        "a",
        " ",
        " \t",
        "\n",
        " \n",
        "ab ",
        "    x",
        "e\u{301}",
        "\u{301}\u{323}",
        "<",
        "<|im_start|>",
    ] {
        let (short, long) = (unit.repeat(8_000 / unit.len()), unit.repeat(64_000 / unit.len()));
        // A busy machine may stretch a measurement, but not every one of ten.
        let mut ratios = (0..10).map(|_| seconds(&long) / seconds(&short));
        assert!(ratios.any(|ratio| ratio < 40.0), "{unit:?}");
    }
}

// Goal: our pipeline around the crate's merges equals the crate's own pipeline, which runs the
// published pattern with its lookahead.
proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..Default::default() })]

    #[test]
    fn random_text_equals_the_whole_crate(
        text in concat!(
            "([ \\t\\r\\n\u{3000}]{0,3}('(s|T|LL)|<\\|im_end\\|>|<tool_call>|",
            "[a-zé中ế\u{301}\u{323}]{0,4}|",
            "[0-9²]{0,3}|\\PC{0,3}|[<|>!.\u{1}🎉\u{200d}]{0,3})){0,8}",
        )
    ) {
        static CRATE: LazyLock<tokenizers::Tokenizer> =
            LazyLock::new(|| SMALL_TOKENIZER.parse().unwrap());
        let encoding = CRATE.encode_fast(text.as_str(), false).unwrap();
        prop_assert_eq!(small_tokenizer().encode(&text).unwrap(), encoding.get_ids());
    }
}
