//! The byte-level alphabet: every byte has a printable character that stands for it in the
//! vocabulary, so that a merge can be written down as text.

use std::sync::LazyLock;

/// The last code point that stands for a byte.
const LAST_CODE_POINT: usize = 0x143;

static TABLES: LazyLock<Tables> = LazyLock::new(Tables::new);

struct Tables {
    char_of: [char; 256],
    byte_of: [Option<u8>; LAST_CODE_POINT + 1],
}

impl Tables {
    fn new() -> Self {
        let mut char_of = ['\0'; 256];
        let mut byte_of = [None; LAST_CODE_POINT + 1];
        // Bytes without a printable Latin-1 character take the code points from 256 on, in order.
        let mut next_code_point = 256;
        for byte in 0..=u8::MAX {
            let code_point = if matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff) {
                u32::from(byte)
            } else {
                next_code_point += 1;
                next_code_point - 1
            };
            char_of[usize::from(byte)] =
                char::from_u32(code_point).expect("code points below 0x144 are characters");
            byte_of[code_point as usize] = Some(byte);
        }
        Self { char_of, byte_of }
    }
}

/// The character that stands for `byte`.
pub(super) fn char_of(byte: u8) -> char {
    TABLES.char_of[usize::from(byte)]
}

/// Appends the bytes that the vocabulary entry `token` stands for. An entry with a character
/// outside the alphabet stands for its own UTF-8 bytes.
pub(super) fn append_bytes(token: &str, bytes: &mut Vec<u8>) {
    let start = bytes.len();
    for character in token.chars() {
        if let Some(Some(byte)) = TABLES.byte_of.get(character as usize) {
            bytes.push(*byte);
        } else {
            bytes.truncate(start);
            bytes.extend_from_slice(token.as_bytes());
            return;
        }
    }
}

/// Replaces `mapped` by the spelling of `text` in the byte-level alphabet.
pub(super) fn spell(text: &str, mapped: &mut String) {
    mapped.clear();
    mapped.extend(text.bytes().map(char_of));
}

#[cfg(test)]
mod tests {
    use super::*;

    // Goal: the alphabet is the published one and its two directions are inverse.
    #[test]
    fn alphabet_is_a_bijection_with_known_members() {
        assert_eq!(char_of(b' '), 'Ġ');
        assert_eq!(char_of(b'\n'), 'Ċ');
        assert_eq!(char_of(b'A'), 'A');
        assert_eq!(char_of(0xad), 'Ń');
        for byte in 0..=u8::MAX {
            let mut bytes = Vec::new();
            append_bytes(&char_of(byte).to_string(), &mut bytes);
            assert_eq!(bytes, [byte]);
        }
    }

    #[test]
    fn an_entry_outside_the_alphabet_keeps_its_own_bytes() {
        let mut bytes = vec![1];
        append_bytes("a 中", &mut bytes);
        assert_eq!(bytes, [&[1], "a 中".as_bytes()].concat());
    }
}
