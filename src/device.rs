//! What the machine offers: threads, memory, mapped files.

pub mod host;
pub mod host_memory;
pub mod mapped_file;
pub mod memory;
pub mod threads;

pub use mapped_file::MappedFile;
//! What the machine is made of: threads today, accelerators beside them.

pub mod threads;
