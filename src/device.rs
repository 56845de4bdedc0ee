//! What the machine offers: threads, memory, mapped files.

pub mod gpu;
pub mod host_memory;
pub mod mapped_file;
pub mod memory;
pub mod reserve;
pub mod thread_clock;
pub mod threads;

pub use mapped_file::MappedFile;

/// Where tensors live and operations run.
#[derive(Clone, Debug)]
pub enum Device {
    /// The processor, on the threads of the current pool.
    Cpu,
    /// A graphics card.
    Gpu(gpu::Gpu),
}
