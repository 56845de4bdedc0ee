//! Key files: they make keys or one line that says what is wrong where; and editing one changes only
//! what it should.

use qwen_server::access::{Digest, Key, KeyFile};

use crate::fuzzer::{fuzz, outcome};

const WORDS: [&str; 28] = [
    "\n[[key]]\n",
    "\n[key]\n",
    "\nkey = []\n",
    "\n[[key.models]]\n",
    "\nname = \"b\"\n",
    "\nname = '",
    "\ndigest = \"blake3:",
    "\ndigest = \"blake3:d74981efa70a0c880b8d8c1985d075dbcbf679b99a5f9914e5aaf96b831a9e24\"\n",
    "\nmodels = [",
    "\"*\"",
    "\nrequests_per_minute = ",
    "\ntokens_per_minute = ",
    "\nmax_concurrent = ",
    "\npriority = ",
    "\nrole = \"admin\"\n",
    "\nrole = ",
    "\nexpires = ",
    "\ncreated = ",
    "1979-05-27",
    "1979-05-27T07:32:00-08:00",
    "9999-12-31T23:59:59.999999999Z",
    "9223372036854775807",
    "-9223372036854775808",
    "18446744073709551616",
    "0",
    "\"\"\"",
    "\u{feff}",
    "\r\n",
];

#[test]
fn key_files_are_taken_or_refused_and_edited_with_care() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("keys.toml");
    fuzz("keys", &WORDS, |input, random| {
        std::fs::write(&path, input).unwrap();
        let mut file = match KeyFile::read(&path) {
            Ok(file) => file,
            Err(error) => {
                let told = error.to_string();
                assert!(!told.contains('\n'), "an error is one line: {told}");
                let letters = told.chars().filter(char::is_ascii_alphabetic);
                return outcome(&letters.skip(20).take(80).collect::<String>());
            }
        };
        let before = file.keys().to_vec();
        for (index, key) in before.iter().enumerate() {
            let rest = &before[index + 1..];
            assert!(rest.iter().all(|other| other.name != key.name && other.digest != key.digest));
        }
        let new = Key::unlimited("the-new-one".parse().unwrap(), Digest::of(input));
        let is_added = file.add(new.clone());
        assert_ne!(is_added, before.iter().any(|key| key.name == new.name));
        file.write(&path).unwrap();
        let mut again = KeyFile::read(&path).expect("what was written can be read");
        assert_eq!(again.keys(), file.keys());
        assert!(again.keys().starts_with(&before));
        let revoked = again.keys().get(random.below(again.keys().len() + 1)).cloned();
        if let Some(key) = &revoked {
            assert!(again.revoke(key.name.as_str()));
            again.write(&path).unwrap();
            let left = KeyFile::read(&path).expect("what was written can be read");
            let expected: Vec<Key> =
                file.keys().iter().filter(|other| other.name != key.name).cloned().collect();
            assert_eq!(left.keys(), expected);
        }
        outcome(&(
            before.len(),
            format!("{:?}", before.first().map(|key| (&key.models, &key.limits))),
        ))
    });
}
