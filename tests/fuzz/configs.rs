//! Config files: they make a configuration or one line that says what is wrong with which key.

use clap::{Args, Command, FromArgMatches};
use qwen_server::cli::args::ServeArgs;
use qwen_server::config::{ConfigFile, Settings};

use crate::fuzzer::{fuzz, outcome};

const WORDS: [&str; 37] = [
    "\nport = 1.5\n",
    "\nhost = [\"a\"]\n",
    "\nseed = 1979-05-27\n",
    "\nmax-queue = {}\n",
    "\nthreads = true\n",
    "\nmodel = 1\n",
    "\nmodel-alias = \"a\"\n",
    "model = ",
    "\nhost = ",
    "\nport = ",
    "\nmax-num-seqs = ",
    "\nmax_num_seqs = ",
    "\nmax-num-batched-tokens = ",
    "\nmax-prefill-tokens-while-decoding = ",
    "\nblock-size = ",
    "\nkv-cache-memory = ",
    "\nkv-cache-dtype = ",
    "\ngpu-memory-utilization = ",
    "\nshutdown-timeout = ",
    "\nmodel-alias = [",
    "\nlog-level = ",
    "\nseed = ",
    "\nthreads = ",
    "\n[aliases]\n",
    "\n[[aliases]]\n",
    "\"a\" = \"b\"",
    "\"*\"",
    "\"4GiB\"",
    "\"99999999999GiB\"",
    "18446744073709551616",
    "-1",
    "1e999",
    "nan",
    "true",
    "\"\"\"",
    "1979-05-27",
    "\"\\u00e9\"",
];

#[test]
fn config_files_are_taken_or_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("config.toml");
    let command = ServeArgs::augment_args(Command::new("serve"));
    fuzz("configs", &WORDS, |input, _| {
        std::fs::write(&path, input).unwrap();
        let refused = |error: String| {
            let told: String = error.chars().filter(char::is_ascii_alphabetic).take(80).collect();
            outcome(&told)
        };
        let file = match ConfigFile::read(&path, &command) {
            Ok(file) => file,
            Err(error) => {
                let told = error.to_string();
                assert!(!told.trim_end().contains('\n'), "an error is one line: {told}");
                return refused(told);
            }
        };
        let matches = match file.apply(command.clone()).try_get_matches_from(["serve"]) {
            Ok(matches) => matches,
            // Values that do not go together.
            Err(error) => return refused(error.to_string()),
        };
        let settings = Settings::collect(&command, &matches, Some(&file));
        let shown = settings.to_string();
        let args = ServeArgs::from_arg_matches(&matches).unwrap();
        match args.into_config(settings) {
            Ok(_) => outcome(&shown.chars().filter(char::is_ascii_alphabetic).count()),
            Err(error) => refused(error.to_string()),
        }
    });
}
