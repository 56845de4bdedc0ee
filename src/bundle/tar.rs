//! The headers of tar archives, as POSIX has them (ustar), for regular files only.
//!
//! Sizes from 8 GiB on do not fit into the digits of that format; they are written as numbers of
//! base 256, which all common readers know.

/// Headers are one block, files are filled up to whole ones.
pub(super) const BLOCK_BYTES: usize = 512;

/// A header.
pub(super) type Block = [u8; BLOCK_BYTES];

/// Where the fields are.
mod field {
    use std::ops::Range;

    pub(super) const NAME: Range<usize> = 0..100;
    pub(super) const MODE: Range<usize> = 100..108;
    pub(super) const OWNER: Range<usize> = 108..116;
    pub(super) const GROUP: Range<usize> = 116..124;
    pub(super) const SIZE: Range<usize> = 124..136;
    pub(super) const MODIFIED: Range<usize> = 136..148;
    pub(super) const CHECKSUM: Range<usize> = 148..156;
    pub(super) const KIND: usize = 156;
    pub(super) const MAGIC: Range<usize> = 257..265;
    pub(super) const PREFIX: Range<usize> = 345..500;
}

const MAGIC: &[u8] = b"ustar\x0000";
const REGULAR_FILE: u8 = b'0';
/// The first byte of a number of base 256.
const BASE_256: u8 = 0x80;

/// A file of an archive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Member {
    pub(super) path: String,
    pub(super) num_bytes: u64,
    /// Its permissions.
    pub(super) mode: u64,
    /// Seconds since 1970.
    pub(super) modified: u64,
}

/// Why a block is no header of a file.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Flaw {
    /// It is no header, or a damaged one.
    Unreadable,
    /// It is one of something else than a file.
    NotAFile { path: String, kind: &'static str },
}

impl Member {
    /// The header, unless the path does not fit.
    pub(super) fn header(&self) -> Option<Block> {
        let mut block = [0; BLOCK_BYTES];
        let (prefix, name) = split_path(&self.path)?;
        block[field::NAME][..name.len()].copy_from_slice(name.as_bytes());
        block[field::PREFIX][..prefix.len()].copy_from_slice(prefix.as_bytes());
        write_number(&mut block[field::MODE], self.mode);
        write_number(&mut block[field::OWNER], 0);
        write_number(&mut block[field::GROUP], 0);
        write_number(&mut block[field::SIZE], self.num_bytes);
        write_number(&mut block[field::MODIFIED], self.modified);
        block[field::KIND] = REGULAR_FILE;
        block[field::MAGIC].copy_from_slice(MAGIC);
        let checksum = format!("{:06o}\0 ", checksum(&block));
        block[field::CHECKSUM].copy_from_slice(checksum.as_bytes());
        Some(block)
    }

    /// Reads a header.
    pub(super) fn parse(block: &Block) -> Result<Self, Flaw> {
        let number = |range| read_number(&block[range]).ok_or(Flaw::Unreadable);
        // Other tars pad the magic with spaces; this is not the place to be strict.
        let is_header = block[field::MAGIC].starts_with(b"ustar")
            && number(field::CHECKSUM)? == checksum(block);
        if !is_header {
            return Err(Flaw::Unreadable);
        }
        let name = text(&block[field::NAME]).ok_or(Flaw::Unreadable)?;
        let prefix = text(&block[field::PREFIX]).ok_or(Flaw::Unreadable)?;
        let path = if prefix.is_empty() { name.to_owned() } else { format!("{prefix}/{name}") };
        if let Some(kind) = other_kind(block[field::KIND]) {
            return Err(Flaw::NotAFile { path, kind });
        }
        Ok(Self {
            path,
            num_bytes: number(field::SIZE)?,
            mode: number(field::MODE)?,
            modified: number(field::MODIFIED)?,
        })
    }
}

/// Bytes between the end of a file and the next header.
pub(super) fn padding(num_bytes: u64) -> usize {
    let filled = num_bytes as usize % BLOCK_BYTES;
    (BLOCK_BYTES - filled) % BLOCK_BYTES
}

/// What stands in the fields for the beginning and the end of a path, cut at a slash.
fn split_path(path: &str) -> Option<(&str, &str)> {
    if path.len() <= field::NAME.len() {
        return Some(("", path));
    }
    path.match_indices('/').map(|(slash, _)| (&path[..slash], &path[slash + 1..])).find(
        |(prefix, name)| prefix.len() <= field::PREFIX.len() && name.len() <= field::NAME.len(),
    )
}

fn other_kind(kind: u8) -> Option<&'static str> {
    Some(match kind {
        REGULAR_FILE | 0 => return None,
        b'1' => "a hard link",
        b'2' => "a symbolic link",
        b'3' | b'4' => "a device",
        b'5' => "a directory",
        b'6' => "a pipe",
        _ => "of a kind that bundles do not have",
    })
}

/// The sum of a header's bytes, with spaces where it is written.
fn checksum(block: &Block) -> u64 {
    let sum = |bytes: &[u8]| bytes.iter().map(|&byte| u64::from(byte)).sum::<u64>();
    sum(block) - sum(&block[field::CHECKSUM]) + 8 * u64::from(b' ')
}

/// Octal digits and a zero byte, or base 256 for what is too large.
fn write_number(field: &mut [u8], value: u64) {
    let width = field.len() - 1;
    let digits = format!("{value:0width$o}");
    if digits.len() == width {
        field[..width].copy_from_slice(digits.as_bytes());
    } else {
        let num_bytes = width.min(8);
        let start = field.len() - num_bytes;
        field[start..].copy_from_slice(&value.to_be_bytes()[8 - num_bytes..]);
        field[0] = BASE_256;
    }
}

fn read_number(field: &[u8]) -> Option<u64> {
    if field[0] == BASE_256 {
        let bytes = &field[1..];
        let (high, low) = bytes.split_at(bytes.len().saturating_sub(8));
        let value = low.iter().fold(0, |value: u64, &byte| value << 8 | u64::from(byte));
        return high.iter().all(|&byte| byte == 0).then_some(value);
    }
    let text = std::str::from_utf8(field).ok()?.trim_matches([' ', '\0']);
    let is_octal = text.bytes().all(|byte| (b'0'..=b'7').contains(&byte));
    if is_octal { u64::from_str_radix(text, 8).ok() } else { None }
}

/// The text before the first zero byte.
fn text(field: &[u8]) -> Option<&str> {
    let end = field.iter().position(|&byte| byte == 0).unwrap_or(field.len());
    std::str::from_utf8(&field[..end]).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(path: &str, num_bytes: u64) -> Member {
        Member { path: path.to_owned(), num_bytes, mode: 0o644, modified: 1_800_000_000 }
    }

    #[test]
    fn headers_are_read_as_they_were_written() {
        let long = format!("model/{}", "x".repeat(100));
        for path in ["a", "model/é.gguf", long.as_str()] {
            for num_bytes in [0, 1, (8 << 30) - 1, 8 << 30, 40 << 30, u64::MAX] {
                let member = member(path, num_bytes);
                assert_eq!(Member::parse(&member.header().unwrap()), Ok(member));
            }
        }
        assert_eq!(member(&"x".repeat(101), 1).header(), None);
        assert_eq!(member(&format!("{}/x", "y".repeat(156)), 1).header(), None);
    }

    /// As GNU tar 1.34 writes a file of 9 GiB: base 256 from 8 GiB on, digits below.
    #[test]
    fn large_sizes_are_what_other_readers_expect() {
        let header = member("a", 9 << 30).header().unwrap();
        assert_eq!(header[field::SIZE], [0x80, 0, 0, 0, 0, 0, 0, 2, 0x40, 0, 0, 0]);
        let header = member("a", (8 << 30) - 1).header().unwrap();
        assert_eq!(&header[field::SIZE], b"77777777777\0");
    }

    #[test]
    fn what_is_no_header_of_a_file_is_refused() {
        let block = member("a", 5).header().unwrap();
        for index in 0..BLOCK_BYTES {
            let mut damaged = block;
            damaged[index] ^= 1;
            assert!(Member::parse(&damaged).is_err(), "byte {index}");
        }
        let mut link = block;
        link[field::KIND] = b'2';
        let sum = format!("{:06o}\0 ", checksum(&link));
        link[field::CHECKSUM].copy_from_slice(sum.as_bytes());
        let flaw = Flaw::NotAFile { path: "a".to_owned(), kind: "a symbolic link" };
        assert_eq!(Member::parse(&link), Err(flaw));
        assert_eq!(Member::parse(&[0; BLOCK_BYTES]), Err(Flaw::Unreadable));
    }

    #[test]
    fn files_end_at_whole_blocks() {
        let paddings = [(0, 0), (1, 511), (511, 1), (512, 0), (513, 511)];
        for (num_bytes, expected) in paddings {
            assert_eq!(padding(num_bytes), expected);
        }
    }
}
