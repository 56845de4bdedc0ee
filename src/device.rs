//! What the machine offers: threads, memory, mapped files.

pub mod host_memory;
pub mod mapped_file;
pub mod memory;
pub mod threads;

pub use mapped_file::MappedFile;
