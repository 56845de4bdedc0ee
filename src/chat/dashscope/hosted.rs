//! Parameters that only the hosted service can honour, and what to do instead.

use crate::chat::options;
use crate::chat::prompt::PromptError;

const HOSTED: [(&str, &str); 9] = [
    (
        "enable_search",
        "searching the web is a service of the hosted platform: offer a tool that searches, or \
         put what you found into a message",
    ),
    (
        "enable_code_interpreter",
        "running code is a service of the hosted platform: offer a tool that runs it",
    ),
    (
        "translation_options",
        "belongs to the hosted translation models: say in a message what to translate into which \
         language",
    ),
    ("skill", "skills run on the hosted platform: offer what they do as tools"),
    ("plugins", "plugins run on the hosted platform: offer what they do as tools"),
    ("output_format", "belongs to a hosted agent: say in a message how the report should look"),
    ("ocr_options", "this model reads only text: extract the text yourself and send that"),
    ("asr_options", "this model reads only text: transcribe the speech yourself and send that"),
    ("audio", "this model writes only text: speak its answer with another program"),
];

/// Whether an unknown parameter is to be named as ignored, or an error if ignoring it would change
/// the answer. `is_neutral` means that its value asks for nothing.
pub fn is_ignored_parameter(
    name: &str,
    is_null: bool,
    is_neutral: bool,
) -> Result<bool, PromptError> {
    match HOSTED.iter().find(|(hosted, _)| *hosted == name) {
        Some(_) if is_neutral => Ok(false),
        Some((name, advice)) => Err(PromptError::invalid(*name, advice)),
        None => options::is_ignored(name, is_null, is_neutral),
    }
}
