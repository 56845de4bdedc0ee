//! A vocabulary of the right size: every byte, Qwen's special tokens at their places, and made-up
//! tokens between them.

/// The first special token of every Qwen2.5.
const FIRST_SPECIAL: u32 = 151_643;

const NORMAL: i32 = 1;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;

/// In the order of their ids.
const SPECIAL: [(&str, i32); 22] = [
    ("<|endoftext|>", CONTROL),
    ("<|im_start|>", CONTROL),
    ("<|im_end|>", CONTROL),
    ("<|object_ref_start|>", CONTROL),
    ("<|object_ref_end|>", CONTROL),
    ("<|box_start|>", CONTROL),
    ("<|box_end|>", CONTROL),
    ("<|quad_start|>", CONTROL),
    ("<|quad_end|>", CONTROL),
    ("<|vision_start|>", CONTROL),
    ("<|vision_end|>", CONTROL),
    ("<|vision_pad|>", CONTROL),
    ("<|image_pad|>", CONTROL),
    ("<|video_pad|>", CONTROL),
    ("<tool_call>", USER_DEFINED),
    ("</tool_call>", USER_DEFINED),
    ("<|fim_prefix|>", CONTROL),
    ("<|fim_middle|>", CONTROL),
    ("<|fim_suffix|>", CONTROL),
    ("<|fim_pad|>", CONTROL),
    ("<|repo_name|>", CONTROL),
    ("<|file_sep|>", CONTROL),
];

/// Tokens with their types.
pub(super) struct Vocabulary {
    pub(super) tokens: Vec<String>,
    pub(super) types: Vec<i32>,
    pub(super) end_of_text: u32,
    pub(super) end_of_turn: u32,
}

impl Vocabulary {
    /// So many tokens, which are at least enough for the bytes and the special ones.
    pub(super) fn new(size: u32) -> Self {
        let first_special = FIRST_SPECIAL.min(size.saturating_sub(SPECIAL.len() as u32));
        let mut tokens: Vec<String> = byte_letters().map(String::from).collect();
        tokens.extend((tokens.len() as u32..first_special).map(|id| format!("<{id}>")));
        let mut types = vec![NORMAL; tokens.len()];
        let end_of_text = tokens.len() as u32;
        for (token, kind) in SPECIAL {
            tokens.push(token.to_owned());
            types.push(kind);
        }
        tokens.extend((tokens.len() as u32..size).map(|id| format!("[PAD{id}]")));
        types.resize(tokens.len(), UNUSED);
        Self { tokens, types, end_of_text, end_of_turn: end_of_text + 2 }
    }
}

/// GPT-2's printable letter for each byte, in the order of its vocabulary: bytes that are printable
/// Latin-1 characters, then letters from 256 on for the others.
fn byte_letters() -> impl Iterator<Item = char> {
    let printable = ('!'..='~').chain('¡'..='¬').chain('®'..='ÿ');
    printable.chain((256..256 + 68).filter_map(char::from_u32))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn special_tokens_are_at_their_places() {
        let vocabulary = Vocabulary::new(152_064);
        assert_eq!(vocabulary.tokens.len(), 152_064);
        assert_eq!(vocabulary.types.len(), 152_064);
        assert_eq!(vocabulary.tokens[151_645], "<|im_end|>");
        assert_eq!(vocabulary.end_of_turn, 151_645);
        assert_eq!(vocabulary.tokens[151_664], "<|file_sep|>");
        assert_eq!(vocabulary.types[151_665], UNUSED);
        assert_eq!(vocabulary.tokens[255].chars().count(), 1);
        assert_eq!(vocabulary.tokens[256], "<256>");
        let distinct: std::collections::HashSet<_> = vocabulary.tokens.iter().collect();
        assert_eq!(distinct.len(), vocabulary.tokens.len());
    }

    #[test]
    fn a_small_vocabulary_has_all_bytes_and_special_tokens() {
        let vocabulary = Vocabulary::new(256 + 22);
        assert_eq!(vocabulary.tokens.len(), 278);
        assert_eq!(vocabulary.tokens[277], "<|file_sep|>");
    }
}
