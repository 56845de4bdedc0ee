//! What the machine is made of: threads today, accelerators beside them.

pub mod threads;
//! What the machine offers: memory mappings of files, threads and accelerators.

pub mod mapped_file;

pub use mapped_file::MappedFile;
