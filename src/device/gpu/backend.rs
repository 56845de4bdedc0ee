//! What a [`Gpu`](super::Gpu) needs of the thing that runs kernels.

use super::{GpuError, Kernel, LaunchConfig};

/// What a card is.
#[derive(Clone, Debug)]
pub struct Properties {
    /// As the vendor calls it.
    pub name: String,
    /// Major and minor compute capability.
    pub capability: (u32, u32),
    /// Streaming multiprocessors.
    pub num_multiprocessors: usize,
    /// Shared memory that one block can have.
    pub max_shared_bytes: usize,
    /// Bytes of its second-level cache.
    pub l2_bytes: usize,
    /// Whether this is the emulation.
    pub is_emulated: bool,
}

/// A dense product `y = x wᵀ` of `bf16` matrices, row-major: `x` is `[num_tokens, num_cols]`, `w`
/// `[num_rows, num_cols]` with rows `row_stride` values apart, `y` `[num_tokens, num_rows]`.
#[derive(Clone, Copy, Debug)]
#[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "only cards have a library for it"))]
pub(super) struct Product {
    pub(super) x: u64,
    pub(super) w: u64,
    pub(super) y: u64,
    pub(super) num_tokens: usize,
    pub(super) num_rows: usize,
    pub(super) num_cols: usize,
    pub(super) row_stride: usize,
    /// Whether `y` is `f32`; `bf16` otherwise.
    pub(super) is_f32: bool,
}

/// Memory and one stream. Addresses are the device's; everything that says "queues" runs after
/// what was queued before it.
pub(super) trait Backend: Send + Sync {
    fn properties(&self) -> &Properties;

    /// Free bytes and all.
    fn memory_info(&self) -> Result<(usize, usize), GpuError>;

    /// The address is a multiple of 256.
    fn alloc(&self, num_bytes: usize) -> Result<u64, GpuError>;

    /// Frees what [`Backend::alloc`] gave, after everything that was queued.
    fn free(&self, address: u64);

    /// Queues a copy; `bytes` may be reused at once.
    fn upload(&self, to: u64, bytes: &[u8]) -> Result<(), GpuError>;

    /// Waits for everything and copies.
    fn download(&self, from: u64, bytes: &mut [u8]) -> Result<(), GpuError>;

    /// Queues a copy to the processor. There is one at a time: another one replaces it.
    fn begin_download(&self, from: u64, num_bytes: usize) -> Result<(), GpuError>;

    /// Waits for the copy that was queued last, and for nothing behind it.
    fn end_download(&self, bytes: &mut [u8]) -> Result<(), GpuError>;

    /// Queues a copy within the device.
    fn copy(&self, to: u64, from: u64, num_bytes: usize) -> Result<(), GpuError>;

    /// Queues zeros.
    fn zero(&self, at: u64, num_bytes: usize) -> Result<(), GpuError>;

    /// Queues a kernel; each argument's value stands in the low bytes of its word.
    fn launch(&self, kernel: Kernel, config: LaunchConfig, args: &[u64]) -> Result<(), GpuError>;

    /// Queues a product through a vendor's library; false if there is none for it.
    fn multiply(&self, _product: &Product) -> Result<bool, GpuError> {
        Ok(false)
    }

    /// Waits for everything.
    fn synchronize(&self) -> Result<(), GpuError>;

    /// From here on what is queued is recorded instead.
    fn begin_capture(&self) -> Result<(), GpuError>;

    /// Ends the recording.
    fn end_capture(&self) -> Result<Graph, GpuError>;

    /// Queues a recording.
    fn replay(&self, graph: &Graph) -> Result<(), GpuError>;
}

/// A recording of kernels, see [`Gpu::capture`](super::Gpu::capture).
pub struct Graph {
    #[cfg_attr(
        not(any(feature = "cuda", feature = "emulation")),
        expect(dead_code, reason = "without a backend nothing is recorded")
    )]
    pub(super) recording: Box<dyn std::any::Any + Send + Sync>,
}

impl std::fmt::Debug for Graph {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Graph")
    }
}
