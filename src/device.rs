//! What the machine offers: memory mappings of files, threads and accelerators.

pub mod host_memory;
pub mod mapped_file;

pub use mapped_file::MappedFile;
