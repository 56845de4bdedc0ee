//! A GPU: its memory, its kernels, and the one stream that runs them in the order of calls.
//!
//! Two things can stand behind a [`Gpu`]: an NVIDIA card (feature `cuda`), or the emulation, which
//! runs the same kernels on the processor and watches them (feature `emulation`). Everything above
//! this module is the same code for both.

mod backend;
#[cfg(feature = "cuda")]
mod cublas;
#[cfg(feature = "cuda")]
mod driver;
#[cfg(feature = "emulation")]
mod emulator;
mod ranges;
mod recordings;

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use self::backend::{Backend, Product};
pub use self::backend::{Graph, Properties};
use self::ranges::FreeRanges;
use self::recordings::{Capture, Recordings};

/// Buffers begin at multiples of this many bytes, so that every vector load is aligned.
const ALIGNMENT: usize = 256;

/// Why something on a GPU could not be done.
#[derive(Debug, thiserror::Error)]
pub enum GpuError {
    /// The program holds no kernels.
    #[error(
        "this build has no CUDA kernels; build it with `--features cuda`, or use `--device cpu`"
    )]
    NotBuilt,
    /// There is no driver or no card.
    #[error("no usable NVIDIA GPU: {0}; check `nvidia-smi`, or use `--device cpu`")]
    Unavailable(String),
    /// The card is older than the kernels.
    #[error(
        "{name} has compute capability {}.{}, and this build has kernels for 8.0 and later; \
         use `--device cpu`, or an Ampere card or a newer one", capability.0, capability.1
    )]
    TooOld {
        /// The card.
        name: String,
        /// Its compute capability.
        capability: (u32, u32),
    },
    /// There is not enough memory.
    #[error("the GPU has no {num_bytes} bytes of memory left")]
    OutOfMemory {
        /// How much was asked for.
        num_bytes: usize,
    },
    /// A call of the driver failed.
    #[error("{call} failed: {text}")]
    Driver {
        /// Which call.
        call: String,
        /// What the driver says.
        text: String,
    },
    /// A kernel did something that it must not.
    #[error("kernel {kernel}: {text}")]
    Kernel {
        /// Which one.
        kernel: &'static str,
        /// What it did.
        text: String,
    },
}

impl From<GpuError> for candle_core::Error {
    fn from(error: GpuError) -> Self {
        Self::wrap(error)
    }
}

/// A kernel's place in `kernels/`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kernel {
    /// Name of the file, without folder and extension.
    pub module: &'static str,
    /// Name of the function.
    pub function: &'static str,
}

/// How many threads run a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LaunchConfig {
    /// Blocks in each direction.
    pub grid: [u32; 3],
    /// Threads of a block in each direction.
    pub block: [u32; 3],
    /// Dynamic shared memory of a block.
    pub shared_bytes: u32,
}

impl LaunchConfig {
    /// So many blocks of so many threads, in one direction and without shared memory.
    pub fn linear(num_blocks: usize, num_threads: u32) -> Self {
        Self { grid: [num_blocks as u32, 1, 1], block: [num_threads, 1, 1], shared_bytes: 0 }
    }
}

/// An argument of a kernel.
#[derive(Clone, Copy, Debug)]
pub enum Arg<'a> {
    /// Where a buffer begins.
    Buffer(&'a DeviceBuffer),
    /// No buffer: a null pointer.
    Null,
    /// An `unsigned`.
    U32(u32),
    /// An `int`.
    I32(i32),
    /// A `long long`.
    I64(i64),
    /// A `float`.
    F32(f32),
}

impl Arg<'_> {
    /// The argument's bytes, the low ones first.
    fn bits(self) -> u64 {
        match self {
            Self::Buffer(buffer) => buffer.address(),
            Self::Null => 0,
            Self::U32(value) => u64::from(value),
            Self::I32(value) => u64::from(value.cast_unsigned()),
            Self::I64(value) => value.cast_unsigned(),
            Self::F32(value) => u64::from(value.to_bits()),
        }
    }
}

/// A dense product, see [`Gpu::multiply`].
#[derive(Clone, Copy, Debug)]
pub struct DenseOperands<'a> {
    /// Activations.
    pub x: &'a DeviceBuffer,
    /// Weights.
    pub w: &'a DeviceBuffer,
    /// The result.
    pub y: &'a DeviceBuffer,
    /// Rows of `x` and `y`.
    pub num_tokens: usize,
    /// Rows of `w`, columns of `y`.
    pub num_rows: usize,
    /// Columns of `x` and `w`.
    pub num_cols: usize,
    /// Values from one row of `w` to the next.
    pub row_stride: usize,
}

/// One GPU. Cheap to clone; all clones are the same card, memory and stream.
#[derive(Clone)]
pub struct Gpu {
    shared: Arc<Shared>,
}

struct Shared {
    backend: Box<dyn Backend>,
    /// Memory for what lives no longer than a step, in pieces that are never given back.
    workspace: Mutex<Vec<Chunk>>,
    recordings: Recordings,
}

/// A piece of the workspace.
struct Chunk {
    address: u64,
    len: usize,
    free: FreeRanges,
}

/// New pieces of workspace are at least this large.
const MIN_CHUNK_BYTES: usize = 16 << 20;

impl Gpu {
    /// Opens the card with this number.
    ///
    /// # Errors
    /// If there is no driver, no such card, or it is too old.
    #[cfg(feature = "cuda")]
    pub fn open(ordinal: usize) -> Result<Self, GpuError> {
        Ok(Self::new(Box::new(driver::Driver::open(ordinal)?)))
    }

    /// Opens the card with this number: this build cannot.
    ///
    /// # Errors
    /// Always.
    #[cfg(not(feature = "cuda"))]
    pub fn open(_ordinal: usize) -> Result<Self, GpuError> {
        Err(GpuError::NotBuilt)
    }

    /// A processor that runs the kernels thread by thread and stops at what they must not do.
    #[cfg(feature = "emulation")]
    pub fn emulated() -> Self {
        Self::new(Box::new(emulator::Emulator::new()))
    }

    /// What kernels are tested on: the first card, or else the emulation, or nothing.
    pub fn for_tests() -> Option<Self> {
        if let Ok(gpu) = Self::open(0) {
            return Some(gpu);
        }
        #[cfg(feature = "emulation")]
        return Some(Self::emulated());
        #[cfg(not(feature = "emulation"))]
        None
    }

    #[cfg_attr(
        not(any(feature = "cuda", feature = "emulation")),
        expect(dead_code, reason = "without a backend nothing is opened")
    )]
    fn new(backend: Box<dyn Backend>) -> Self {
        let (workspace, recordings) = Default::default();
        Self { shared: Arc::new(Shared { backend, workspace, recordings }) }
    }

    /// What the card is.
    pub fn properties(&self) -> &Properties {
        self.shared.backend.properties()
    }

    /// Whether kernels run on the processor.
    pub fn is_emulated(&self) -> bool {
        self.properties().is_emulated
    }

    /// How many blocks run at the same time at least.
    pub fn num_multiprocessors(&self) -> usize {
        self.properties().num_multiprocessors
    }

    /// Memory that is free, and all that there is.
    ///
    /// # Errors
    /// If the driver fails.
    pub fn memory_info(&self) -> Result<(usize, usize), GpuError> {
        self.shared.backend.memory_info()
    }

    /// Memory that stays until it is dropped. What it holds is undefined.
    ///
    /// # Errors
    /// If there is none left.
    pub fn alloc(&self, num_bytes: usize) -> Result<DeviceBuffer, GpuError> {
        let address = self.shared.backend.alloc(num_bytes.max(1))?;
        Ok(self.buffer(address, num_bytes, Place::Own))
    }

    /// Memory that holds these bytes.
    ///
    /// # Errors
    /// If there is none left.
    pub fn alloc_from(&self, bytes: &[u8]) -> Result<DeviceBuffer, GpuError> {
        let buffer = self.alloc(bytes.len())?;
        buffer.upload(bytes)?;
        Ok(buffer)
    }

    /// Memory for a result that lives no longer than a step. It is taken from a workspace without
    /// a call of the driver, unless the workspace must grow; the same calls in the same order give
    /// the same addresses, which recorded graphs rely on. What it holds is undefined.
    ///
    /// # Errors
    /// If there is none left.
    pub fn scratch(&self, num_bytes: usize) -> Result<DeviceBuffer, GpuError> {
        // The emulation watches the ends of each allocation, so each is one of its own.
        if self.is_emulated() {
            return self.alloc(num_bytes);
        }
        let len = num_bytes.max(1).next_multiple_of(ALIGNMENT);
        let mut chunks = self.shared.chunks();
        for (index, chunk) in chunks.iter_mut().enumerate() {
            if let Some(start) = chunk.free.take(len) {
                let place = Place::Scratch { chunk: index, range: start..start + len };
                return Ok(self.buffer(chunk.address + start as u64, num_bytes, place));
            }
        }
        let chunk_bytes = len.max(MIN_CHUNK_BYTES);
        let address = self.shared.backend.alloc(chunk_bytes)?;
        let mut free = FreeRanges::new(chunk_bytes);
        let start = free.take(len).expect("a new chunk is large enough");
        chunks.push(Chunk { address, len: chunk_bytes, free });
        let place = Place::Scratch { chunk: chunks.len() - 1, range: start..start + len };
        Ok(self.buffer(address + start as u64, num_bytes, place))
    }

    /// Memory that the workspace has, in use or not.
    pub fn workspace_bytes(&self) -> usize {
        self.shared.chunks().iter().map(|chunk| chunk.len).sum()
    }

    /// The memory that was parked, as a buffer again.
    ///
    /// # Panics
    /// If somebody has it: between steps nobody has scratch memory.
    pub fn retake(&self, parked: &Parked) -> DeviceBuffer {
        let Some((chunk, range)) = &parked.place else {
            return parked.kept.clone().expect("memory of its own is kept");
        };
        let is_free = self.shared.chunks()[*chunk].free.take_range(range.clone());
        assert!(is_free, "scratch memory that a graph writes to is in use");
        let place = Place::Scratch { chunk: *chunk, range: range.clone() };
        self.buffer(parked.address, parked.len, place)
    }

    fn buffer(&self, address: u64, num_bytes: usize, place: Place) -> DeviceBuffer {
        let memory = Memory { gpu: self.clone(), address, place };
        DeviceBuffer { memory: Arc::new(memory), start: 0, len: num_bytes }
    }

    /// Runs a kernel after everything before it.
    ///
    /// # Errors
    /// If the driver refuses the launch. What a kernel does wrong shows here when emulated, and at
    /// the next [`Gpu::synchronize`] or download otherwise.
    pub fn launch(
        &self,
        kernel: Kernel,
        config: LaunchConfig,
        args: &[Arg<'_>],
    ) -> Result<(), GpuError> {
        if config.grid.contains(&0) {
            return Ok(());
        }
        let args: Vec<u64> = args.iter().map(|arg| arg.bits()).collect();
        self.shared.backend.launch(kernel, config, &args)
    }

    /// Multiplies dense `bf16` matrices, `y = x wᵀ`, through the vendor's library after everything
    /// before it: `x` `[num_tokens, num_cols]`, `w` `[num_rows, row_stride]`, and `y`
    /// `[num_tokens, num_rows]` in `f32` or `bf16`, as its size says. Returns false, and does
    /// nothing, if there is no library.
    ///
    /// # Errors
    /// If the library fails.
    ///
    /// # Panics
    /// If a buffer is too small for its shape.
    pub fn multiply(&self, operands: &DenseOperands<'_>) -> Result<bool, GpuError> {
        let DenseOperands { x, w, y, num_tokens, num_rows, num_cols, row_stride } = *operands;
        assert!(num_cols <= row_stride, "rows of {num_cols} values, {row_stride} apart");
        assert!(2 * num_tokens * num_cols <= x.len() && 2 * num_rows * row_stride <= w.len());
        let element_bytes = y.len() / (num_tokens * num_rows).max(1);
        assert!(matches!(element_bytes, 2 | 4) && num_tokens * num_rows * element_bytes == y.len());
        self.shared.backend.multiply(&Product {
            x: x.address(),
            w: w.address(),
            y: y.address(),
            num_tokens,
            num_rows,
            num_cols,
            row_stride,
            is_f32: element_bytes == 4,
        })
    }

    /// Fills a buffer with zeros after everything before it.
    ///
    /// # Errors
    /// If the driver fails.
    pub fn zero(&self, buffer: &DeviceBuffer) -> Result<(), GpuError> {
        let _outside = self.shared.recordings.outside();
        self.shared.backend.zero(buffer.address(), buffer.len())
    }

    /// Copies bytes between buffers of equal length, after everything before it.
    ///
    /// # Errors
    /// If the driver fails.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn copy(&self, to: &DeviceBuffer, from: &DeviceBuffer) -> Result<(), GpuError> {
        assert_eq!(to.len(), from.len(), "buffers of equal length");
        self.shared.backend.copy(to.address(), from.address(), to.len())
    }

    /// Waits until everything has been done.
    ///
    /// # Errors
    /// If something of it failed.
    pub fn synchronize(&self) -> Result<(), GpuError> {
        self.shared.backend.synchronize()
    }

    /// Records what `record` launches without running it. Other threads that upload, zero or free
    /// something wait: it would be recorded too, or spoil the recording.
    ///
    /// # Errors
    /// As `record`, or if the driver fails.
    pub fn capture<T, E: From<GpuError>>(
        &self,
        record: impl FnOnce() -> Result<T, E>,
    ) -> Result<(T, Graph), E> {
        let _recorder = self.shared.recordings.begin();
        let capture = Capture::begin(&*self.shared.backend)?;
        let recorded = record();
        let graph = capture.end();
        Ok((recorded?, graph?))
    }

    /// Runs a recording after everything before it.
    ///
    /// # Errors
    /// If the driver fails.
    pub fn replay(&self, graph: &Graph) -> Result<(), GpuError> {
        self.shared.backend.replay(graph)
    }
}

impl std::fmt::Debug for Gpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gpu").field("name", &self.properties().name).finish_non_exhaustive()
    }
}

impl Shared {
    fn chunks(&self) -> MutexGuard<'_, Vec<Chunk>> {
        self.workspace.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where memory goes when nobody uses it any more.
enum Place {
    Own,
    Scratch { chunk: usize, range: Range<usize> },
}

struct Memory {
    gpu: Gpu,
    address: u64,
    place: Place,
}

impl Drop for Memory {
    fn drop(&mut self) {
        match &self.place {
            Place::Own => {
                let _outside = self.gpu.shared.recordings.outside();
                self.gpu.shared.backend.free(self.address);
            }
            Place::Scratch { chunk, range } => {
                self.gpu.shared.chunks()[*chunk].free.give_back(range.clone());
            }
        }
    }
}

/// Where a piece of scratch memory was, see [`DeviceBuffer::park`].
pub struct Parked {
    /// In the emulation the memory itself, which is not taken from a workspace.
    kept: Option<DeviceBuffer>,
    address: u64,
    len: usize,
    place: Option<(usize, Range<usize>)>,
}

/// A range of bytes in a GPU's memory. Clones and slices are views of the same bytes.
///
/// Scratch memory may be dropped as soon as the last kernel that uses it was launched: what is put
/// there next runs after it.
#[derive(Clone)]
pub struct DeviceBuffer {
    memory: Arc<Memory>,
    start: usize,
    len: usize,
}

impl DeviceBuffer {
    /// How many bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    fn address(&self) -> u64 {
        self.memory.address + self.start as u64
    }

    /// Some of the bytes.
    ///
    /// # Panics
    /// If they lie outside.
    #[must_use]
    pub fn slice(&self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} of {}", self.len);
        let memory = Arc::clone(&self.memory);
        Self { memory, start: self.start + range.start, len: range.len() }
    }

    /// Gives scratch memory back and remembers where it was: a recorded graph writes its results
    /// there each time it runs, and [`Gpu::retake`] makes a buffer of them.
    pub fn park(self) -> Parked {
        let place = match &self.memory.place {
            Place::Own => None,
            Place::Scratch { chunk, range } => Some((*chunk, range.clone())),
        };
        let (address, len) = (self.memory.address, self.len);
        Parked { kept: place.is_none().then_some(self), address, len, place }
    }

    /// Copies bytes to the beginning of the buffer after everything before it. `bytes` may be
    /// reused at once.
    ///
    /// # Errors
    /// If the driver fails.
    ///
    /// # Panics
    /// If there are more than the buffer holds.
    pub fn upload(&self, bytes: &[u8]) -> Result<(), GpuError> {
        assert!(bytes.len() <= self.len, "{} bytes into {}", bytes.len(), self.len);
        let _outside = self.memory.gpu.shared.recordings.outside();
        self.memory.gpu.shared.backend.upload(self.address(), bytes)
    }

    /// The bytes, after everything before it.
    ///
    /// # Errors
    /// If the driver fails, or something before it did.
    pub fn download(&self) -> Result<Vec<u8>, GpuError> {
        let mut bytes = vec![0; self.len];
        self.download_into(&mut bytes)?;
        Ok(bytes)
    }

    /// The bytes at the beginning of the buffer, after everything before it.
    ///
    /// # Errors
    /// If the driver fails, or something before it did.
    ///
    /// # Panics
    /// If more are wanted than the buffer holds.
    pub fn download_into(&self, bytes: &mut [u8]) -> Result<(), GpuError> {
        assert!(bytes.len() <= self.len, "{} bytes out of {}", bytes.len(), self.len);
        self.memory.gpu.shared.backend.download(self.address(), bytes)
    }

    /// Queues a copy of the first bytes to the processor, see [`DeviceBuffer::end_download`]. There
    /// is one at a time on a card: another one replaces it.
    ///
    /// # Errors
    /// If the driver fails.
    ///
    /// # Panics
    /// If more are wanted than the buffer holds.
    pub fn begin_download(&self, num_bytes: usize) -> Result<(), GpuError> {
        assert!(num_bytes <= self.len, "{num_bytes} bytes out of {}", self.len);
        self.memory.gpu.shared.backend.begin_download(self.address(), num_bytes)
    }

    /// The bytes of the copy that was queued last, without waiting for what was queued after it.
    ///
    /// # Errors
    /// If the driver fails, or something before the copy did.
    pub fn end_download(&self, bytes: &mut [u8]) -> Result<(), GpuError> {
        self.memory.gpu.shared.backend.end_download(bytes)
    }
}

impl std::fmt::Debug for DeviceBuffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "DeviceBuffer({} bytes)", self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GATHER: Kernel = Kernel { module: "gather_rows", function: "gather_rows_f32_1" };

    /// Copies the rows of three values that `rows` names.
    fn gather(
        gpu: &Gpu,
        x: &DeviceBuffer,
        rows: &DeviceBuffer,
        out: &DeviceBuffer,
    ) -> Result<(), GpuError> {
        let num_rows = rows.len() as u32 / 4;
        let config = LaunchConfig { grid: [1, num_rows, 1], block: [32, 1, 1], shared_bytes: 0 };
        let args =
            [Arg::Buffer(x), Arg::Buffer(rows), Arg::Buffer(out), Arg::U32(num_rows), Arg::I32(3)];
        gpu.launch(GATHER, config, &args)
    }

    fn words(gpu: &Gpu, words: &[u32]) -> DeviceBuffer {
        gpu.alloc_from(bytemuck::cast_slice(words)).unwrap()
    }

    /// Goal: a recording does again what was recorded, with what its inputs are then, and puts the
    /// result where it was put.
    #[test]
    fn a_recording_runs_again_on_other_inputs() {
        let Some(gpu) = Gpu::for_tests() else { return };
        let x = words(&gpu, &[1, 2, 3, 4, 5, 6, 7, 8, 9]);
        let rows = words(&gpu, &[2, 0]);
        gather(&gpu, &x, &rows, &gpu.scratch(24).unwrap()).unwrap();
        let (out, graph) = gpu
            .capture(|| {
                let between = gpu.scratch(24)?;
                gather(&gpu, &x, &rows, &between)?;
                let out = gpu.scratch(24)?;
                gpu.copy(&out, &between)?;
                Ok::<_, GpuError>(out)
            })
            .unwrap();
        let parked = out.park();
        for (input, expected) in [([2, 0], [7, 8, 9, 1, 2, 3]), ([1, 1], [4, 5, 6, 4, 5, 6])] {
            rows.upload(bytemuck::cast_slice(&input)).unwrap();
            gpu.replay(&graph).unwrap();
            let out = gpu.retake(&parked).download().unwrap();
            assert_eq!(bytemuck::pod_collect_to_vec::<u8, u32>(&out), expected);
        }
    }

    /// Goal: the emulation is an oracle. Method: a kernel is given a buffer that is too short, and
    /// one that nobody wrote.
    #[test]
    #[cfg(feature = "emulation")]
    fn the_emulation_sees_what_kernels_must_not_do() {
        let gpu = Gpu::emulated();
        let x = words(&gpu, &[1, 2, 3]);
        let rows = words(&gpu, &[0, 0]);
        let error = gather(&gpu, &x, &rows, &gpu.alloc(20).unwrap()).unwrap_err().to_string();
        assert!(error.contains("wrote behind a buffer of 20 bytes"), "{error}");

        let out = gpu.alloc(12).unwrap();
        gather(&gpu, &gpu.alloc(12).unwrap(), &rows.slice(0..4), &out).unwrap();
        let read: Vec<f32> = bytemuck::pod_collect_to_vec(&out.download().unwrap());
        assert!(read.iter().all(|value| value.is_nan()));

        let missing = Kernel { module: "gather_rows", function: "no_such_kernel" };
        let error = gpu.launch(missing, LaunchConfig::linear(1, 1), &[]).unwrap_err().to_string();
        assert!(error.contains("no_such_kernel"), "{error}");
    }

    /// Goal: what others do to the card's memory meanwhile is neither lost nor recorded. Method: a
    /// thread that uploads, zeros and frees, begun in the middle of a recording.
    #[test]
    fn other_threads_wait_for_the_end_of_a_recording() {
        let Some(gpu) = Gpu::for_tests() else { return };
        let (x, rows) = (words(&gpu, &[1, 2, 3]), words(&gpu, &[0]));
        gather(&gpu, &x, &rows, &gpu.scratch(12).unwrap()).unwrap();
        let (others, zeros) = (words(&gpu, &[0; 3]), words(&gpu, &[9; 3]));
        let (free_before, _) = gpu.memory_info().unwrap();
        let dropped = gpu.alloc(32 << 20).unwrap();
        let graph = std::thread::scope(|scope| {
            let ((), graph) = gpu
                .capture(|| {
                    let worker = scope.spawn(|| {
                        others.upload(bytemuck::cast_slice(&[4_u32, 5, 6])).unwrap();
                        gpu.zero(&zeros).unwrap();
                        drop(dropped);
                    });
                    std::thread::sleep(std::time::Duration::from_millis(50));
                    assert!(!worker.is_finished(), "it does not wait");
                    gather(&gpu, &x, &rows, &gpu.scratch(12)?)?;
                    Ok::<_, GpuError>(())
                })
                .unwrap();
            graph
        });
        let found = |buffer: &DeviceBuffer| {
            bytemuck::pod_collect_to_vec::<u8, u32>(&buffer.download().unwrap())
        };
        assert_eq!((found(&others), found(&zeros)), (vec![4, 5, 6], vec![0; 3]));
        // Of a card others take memory too.
        let (free, _) = gpu.memory_info().unwrap();
        let is_freed = free_before.abs_diff(free) < 1 << 20;
        assert!(is_freed || !gpu.is_emulated(), "{free_before} bytes were free, now {free}");
        // The recording has nothing of it.
        zeros.upload(bytemuck::cast_slice(&[7_u32; 3])).unwrap();
        gpu.replay(&graph).unwrap();
        assert_eq!(found(&zeros), [7; 3]);
    }

    #[test]
    fn a_recording_that_panics_is_over() {
        let Some(gpu) = Gpu::for_tests() else { return };
        let record = || gpu.capture(|| -> Result<(), GpuError> { panic!("on purpose") });
        assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(record)).is_err());
        let buffer = words(&gpu, &[0; 3]);
        buffer.upload(bytemuck::cast_slice(&[4_u32, 5, 6])).unwrap();
        let found: Vec<u32> = bytemuck::pod_collect_to_vec(&buffer.download().unwrap());
        assert_eq!(found, [4, 5, 6]);
        gpu.capture(|| Ok::<_, GpuError>(())).unwrap();
    }

    #[test]
    fn scratch_memory_is_reused_in_the_same_order() {
        let Some(gpu) = Gpu::for_tests() else { return };
        if gpu.is_emulated() {
            return;
        }
        let step = || {
            let (a, b) = (gpu.scratch(1000).unwrap(), gpu.scratch(5000).unwrap());
            drop(a);
            let c = gpu.scratch(300).unwrap();
            [b.address(), c.address()]
        };
        assert_eq!(step(), step());
    }

    #[test]
    fn bytes_come_back_as_they_went() {
        let Some(gpu) = Gpu::for_tests() else { return };
        let bytes: Vec<u8> = (0..1000).map(|i| (i % 251) as u8).collect();
        let buffer = gpu.alloc_from(&bytes).unwrap();
        assert_eq!(buffer.slice(10..20).download().unwrap(), bytes[10..20]);
        let copy = gpu.scratch(500).unwrap();
        gpu.copy(&copy, &buffer.slice(250..750)).unwrap();
        gpu.zero(&copy.slice(0..3)).unwrap();
        copy.begin_download(2).unwrap();
        copy.begin_download(500).unwrap();
        let found = copy.download().unwrap();
        gpu.zero(&copy).unwrap();
        let mut begun = vec![0; 500];
        copy.end_download(&mut begun).unwrap();
        assert_eq!(begun, found, "as they were when the copy was queued");
        assert_eq!((&found[..3], &found[3..]), (&[0, 0, 0][..], &bytes[253..750]));
    }

    #[test]
    fn large_uploads_arrive_whole() {
        let Some(gpu) = Gpu::for_tests() else { return };
        let words: Vec<u32> = (0..5_000_000_u32).map(|i| i.wrapping_mul(2_654_435_761)).collect();
        let buffer = gpu.alloc_from(bytemuck::cast_slice(&words)).unwrap();
        assert!(buffer.download().unwrap() == bytemuck::cast_slice::<u32, u8>(&words));
    }
}
