//! An NVIDIA card, through the driver's own interface, which is opened when the program asks for
//! it: a machine without a driver runs the same program.

use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use cudarc::driver::{DriverError, result, sys};

use super::backend::{Backend, Graph, Product, Properties};
use super::cublas::CublasLt;
use super::{GpuError, Kernel, LaunchConfig};

/// Names and contents of the compiled kernel files.
static FATBINS: &[(&str, &[u8])] = include!(concat!(env!("OUT_DIR"), "/fatbins.rs"));

/// Dynamic shared memory that every function has without asking for it.
const DEFAULT_SHARED_BYTES: u32 = 48 << 10;
/// Bytes of each half of the pinned memory that uploads go through.
const STAGING_BYTES: usize = 8 << 20;
/// Bytes of the pinned memory that small downloads go through, which saves a copy of the driver's.
const RESULT_BYTES: usize = 1 << 20;

pub(super) struct Driver {
    device: sys::CUdevice,
    context: sys::CUcontext,
    stream: sys::CUstream,
    properties: Properties,
    modules: Vec<(&'static str, sys::CUmodule)>,
    functions: Mutex<HashMap<(&'static str, &'static str), Function>>,
    staging: Mutex<Staging>,
    /// Opened at the first dense product.
    cublas: OnceLock<Option<CublasLt>>,
}

// SAFETY: the handles name objects of the driver, which may be used from any thread that has made
// their context its own; every call does so first. What changes is behind locks.
unsafe impl Send for Driver {}
// SAFETY: as above.
unsafe impl Sync for Driver {}

#[derive(Clone, Copy)]
struct Function {
    handle: sys::CUfunction,
    /// What it may use at present.
    shared_bytes: u32,
}

/// Two halves of pinned memory: one is filled while the copies out of the other are under way.
struct Staging {
    memory: *mut u8,
    /// Where downloads arrive.
    results: *mut u8,
    /// Where the download arrives that nobody waits for yet.
    begun: *mut u8,
    /// Passed when it has.
    arrived: sys::CUevent,
    /// Passed when the copies out of a half are done.
    events: [sys::CUevent; 2],
    half: usize,
    /// Bytes of the current half that are in use.
    used: usize,
}

fn error(call: &str, source: DriverError) -> GpuError {
    let text = source
        .error_string()
        .map_or_else(|_| format!("{:?}", source.0), |text| text.to_string_lossy().into_owned());
    GpuError::Driver { call: call.to_owned(), text }
}

impl Driver {
    /// Opens the card, loads all kernels.
    pub(super) fn open(ordinal: usize) -> Result<Self, GpuError> {
        // SAFETY: only tries to open the driver's library.
        if !unsafe { sys::is_culib_present() } {
            return Err(GpuError::Unavailable("the NVIDIA driver is not installed".to_owned()));
        }
        let unavailable = |source: DriverError| match error("", source) {
            GpuError::Driver { text, .. } => GpuError::Unavailable(text),
            other => other,
        };
        result::init().map_err(unavailable)?;
        let number = i32::try_from(ordinal).unwrap_or(i32::MAX);
        let device = result::device::get(number).map_err(unavailable)?;
        let properties = properties(device)?;
        // SAFETY: the device is one that the driver named; the handles that are made here are used
        // only with each other and destroyed in `drop`.
        let (context, stream) = unsafe {
            let context = result::primary_ctx::retain(device)
                .map_err(|e| error("cuDevicePrimaryCtxRetain", e))?;
            result::ctx::set_current(context).map_err(|e| error("cuCtxSetCurrent", e))?;
            let stream = result::stream::create(result::stream::StreamKind::NonBlocking)
                .map_err(|e| error("cuStreamCreate", e))?;
            (context, stream)
        };
        let mut modules = Vec::new();
        for (name, fatbin) in FATBINS {
            // SAFETY: the image is a whole fatbin that nvcc wrote.
            let module = unsafe { result::module::load_data(fatbin.as_ptr().cast()) }
                .map_err(|e| error(&format!("cuModuleLoadData({name})"), e))?;
            modules.push((*name, module));
        }
        Ok(Self {
            device,
            context,
            stream,
            properties,
            modules,
            functions: Mutex::default(),
            staging: Mutex::new(Staging::new()?),
            cublas: OnceLock::new(),
        })
    }

    /// Makes the card's context the calling thread's.
    fn enter(&self) -> Result<(), GpuError> {
        // SAFETY: the context lives as long as `self`.
        unsafe { result::ctx::set_current(self.context) }.map_err(|e| error("cuCtxSetCurrent", e))
    }

    fn functions(&self) -> MutexGuard<'_, HashMap<(&'static str, &'static str), Function>> {
        self.functions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The function, allowed to use so much shared memory.
    fn function(&self, kernel: Kernel, shared_bytes: u32) -> Result<sys::CUfunction, GpuError> {
        let mut functions = self.functions();
        let key = (kernel.module, kernel.function);
        let function = match functions.get_mut(&key) {
            Some(function) => function,
            None => functions.entry(key).or_insert(self.find(kernel)?),
        };
        if function.shared_bytes < shared_bytes {
            let attribute =
                sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            let wanted = i32::try_from(shared_bytes).unwrap_or(i32::MAX);
            // SAFETY: the function belongs to a module that is loaded.
            unsafe { result::function::set_function_attribute(function.handle, attribute, wanted) }
                .map_err(|e| error(&format!("cuFuncSetAttribute({})", kernel.function), e))?;
            function.shared_bytes = shared_bytes;
        }
        Ok(function.handle)
    }

    fn find(&self, kernel: Kernel) -> Result<Function, GpuError> {
        let missing =
            |text: &str| GpuError::Kernel { kernel: kernel.function, text: text.to_owned() };
        let module = self.modules.iter().find(|(name, _)| *name == kernel.module);
        let (_, module) = module.ok_or_else(|| missing("its file is not in this build"))?;
        let name = CString::new(kernel.function).map_err(|_| missing("is no name"))?;
        // SAFETY: the module is loaded.
        let handle = unsafe { result::module::get_function(*module, name) }
            .map_err(|e| error(&format!("cuModuleGetFunction({})", kernel.function), e))?;
        Ok(Function { handle, shared_bytes: DEFAULT_SHARED_BYTES })
    }
}

fn properties(device: sys::CUdevice) -> Result<Properties, GpuError> {
    use sys::CUdevice_attribute as Attribute;
    let attribute = |attribute| {
        // SAFETY: the device is one that the driver named.
        unsafe { result::device::get_attribute(device, attribute) }
            .map_err(|e| error("cuDeviceGetAttribute", e))
    };
    let name = result::device::get_name(device).map_err(|e| error("cuDeviceGetName", e))?;
    let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    let capability = (major.unsigned_abs(), minor.unsigned_abs());
    if capability < (8, 0) {
        return Err(GpuError::TooOld { name, capability });
    }
    let number = |value: i32| usize::try_from(value).unwrap_or(0);
    Ok(Properties {
        name,
        capability,
        num_multiprocessors: number(attribute(
            Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT,
        )?),
        max_shared_bytes: number(attribute(
            Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN,
        )?),
        l2_bytes: number(attribute(Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)?),
        is_emulated: false,
    })
}

impl Staging {
    fn new() -> Result<Self, GpuError> {
        // SAFETY: the current context is the card's; freed in `Driver::drop`.
        let memory = unsafe { result::malloc_host(2 * STAGING_BYTES, 0) }
            .map_err(|e| error("cuMemHostAlloc", e))?;
        let event = || {
            result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)
                .map_err(|e| error("cuEventCreate", e))
        };
        let pinned = || {
            // SAFETY: as above.
            unsafe { result::malloc_host(RESULT_BYTES, 0) }.map_err(|e| error("cuMemHostAlloc", e))
        };
        Ok(Self {
            memory: memory.cast(),
            results: pinned()?.cast(),
            begun: pinned()?.cast(),
            arrived: event()?,
            events: [event()?, event()?],
            half: 0,
            used: 0,
        })
    }

    /// Queues a copy of at most half of the memory.
    fn upload(&mut self, to: u64, bytes: &[u8], stream: sys::CUstream) -> Result<(), DriverError> {
        if STAGING_BYTES < self.used + bytes.len() {
            // SAFETY: event and stream are the card's; the other half is free once what was copied
            // out of it has passed its event.
            unsafe {
                result::event::record(self.events[self.half], stream)?;
                self.half = 1 - self.half;
                result::event::synchronize(self.events[self.half])?;
            }
            self.used = 0;
        }
        let start = self.half * STAGING_BYTES + self.used;
        self.used += bytes.len().next_multiple_of(64);
        // SAFETY: `start` and the bytes behind it lie in the half that no copy reads any more; they
        // are not written before its event has passed.
        unsafe {
            let staged = std::slice::from_raw_parts_mut(self.memory.add(start), bytes.len());
            staged.copy_from_slice(bytes);
            result::memcpy_htod_async(to, staged, stream)
        }
    }
}

/// An executable graph.
struct Executable(sys::CUgraphExec);

// SAFETY: a handle of the driver, see `Driver`.
unsafe impl Send for Executable {}
// SAFETY: as above; it is only launched.
unsafe impl Sync for Executable {}

impl Drop for Executable {
    fn drop(&mut self) {
        // SAFETY: made by `instantiate` and destroyed once.
        let _ = unsafe { result::graph::exec_destroy(self.0) };
    }
}

impl Backend for Driver {
    fn properties(&self) -> &Properties {
        &self.properties
    }

    fn memory_info(&self) -> Result<(usize, usize), GpuError> {
        self.enter()?;
        result::mem_get_info().map_err(|e| error("cuMemGetInfo", e))
    }

    fn alloc(&self, num_bytes: usize) -> Result<u64, GpuError> {
        self.enter()?;
        // SAFETY: plain memory; freed by `free`.
        unsafe { result::malloc_sync(num_bytes) }.map_err(|e| match e.0 {
            sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => GpuError::OutOfMemory { num_bytes },
            _ => error("cuMemAlloc", e),
        })
    }

    fn free(&self, address: u64) {
        // SAFETY: the address came from `alloc` and nobody has it any more. The call waits for what
        // was queued.
        let freed = self.enter().and_then(|()| {
            unsafe { result::memory_free(address) }.map_err(|e| error("cuMemFree", e))
        });
        if let Err(error) = freed {
            tracing::warn!("GPU memory is lost: {error}");
        }
    }

    fn upload(&self, to: u64, bytes: &[u8]) -> Result<(), GpuError> {
        self.enter()?;
        let mut staging = self.staging.lock().unwrap_or_else(PoisonError::into_inner);
        for (index, part) in bytes.chunks(STAGING_BYTES).enumerate() {
            let to = to + (index * STAGING_BYTES) as u64;
            staging.upload(to, part, self.stream).map_err(|e| error("cuMemcpyHtoDAsync", e))?;
        }
        Ok(())
    }

    fn download(&self, from: u64, bytes: &mut [u8]) -> Result<(), GpuError> {
        self.enter()?;
        if bytes.len() <= RESULT_BYTES {
            let staging = self.staging.lock().unwrap_or_else(PoisonError::into_inner);
            // SAFETY: the lock makes the pinned memory ours until the copy is done.
            let pinned = unsafe { std::slice::from_raw_parts_mut(staging.results, bytes.len()) };
            // SAFETY: the caller checked that the buffer has so many bytes.
            unsafe { result::memcpy_dtoh_async(pinned, from, self.stream) }
                .map_err(|e| error("cuMemcpyDtoHAsync", e))?;
            self.synchronize()?;
            bytes.copy_from_slice(pinned);
            return Ok(());
        }
        // SAFETY: the caller checked that the buffer has so many bytes; `bytes` is not touched
        // before the copy is done.
        unsafe { result::memcpy_dtoh_async(bytes, from, self.stream) }
            .map_err(|e| error("cuMemcpyDtoHAsync", e))?;
        self.synchronize()
    }

    fn begin_download(&self, from: u64, num_bytes: usize) -> Result<(), GpuError> {
        self.enter()?;
        assert!(num_bytes <= RESULT_BYTES, "{num_bytes} bytes of results");
        let staging = self.staging.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the pinned memory is read only after the event; what replaces a copy is queued
        // behind it. The caller checked that the buffer has so many bytes.
        unsafe {
            let pinned = std::slice::from_raw_parts_mut(staging.begun, num_bytes);
            result::memcpy_dtoh_async(pinned, from, self.stream)
                .map_err(|e| error("cuMemcpyDtoHAsync", e))?;
            result::event::record(staging.arrived, self.stream)
        }
        .map_err(|e| error("cuEventRecord", e))
    }

    fn end_download(&self, bytes: &mut [u8]) -> Result<(), GpuError> {
        self.enter()?;
        assert!(bytes.len() <= RESULT_BYTES, "{} bytes of results", bytes.len());
        let staging = self.staging.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the event is live; behind it the copy is complete and the lock keeps others away.
        let pinned = unsafe {
            result::event::synchronize(staging.arrived)
                .map_err(|e| error("cuEventSynchronize", e))?;
            std::slice::from_raw_parts(staging.begun, bytes.len())
        };
        bytes.copy_from_slice(pinned);
        Ok(())
    }

    fn copy(&self, to: u64, from: u64, num_bytes: usize) -> Result<(), GpuError> {
        self.enter()?;
        // SAFETY: both are ranges of live buffers.
        unsafe { result::memcpy_dtod_async(to, from, num_bytes, self.stream) }
            .map_err(|e| error("cuMemcpyDtoDAsync", e))
    }

    fn zero(&self, at: u64, num_bytes: usize) -> Result<(), GpuError> {
        self.enter()?;
        // SAFETY: a range of a live buffer.
        unsafe { result::memset_d8_async(at, 0, num_bytes, self.stream) }
            .map_err(|e| error("cuMemsetD8Async", e))
    }

    fn launch(&self, kernel: Kernel, config: LaunchConfig, args: &[u64]) -> Result<(), GpuError> {
        self.enter()?;
        let function = self.function(kernel, config.shared_bytes)?;
        let mut words = args.to_vec();
        let mut pointers: Vec<*mut c_void> =
            words.iter_mut().map(|word| std::ptr::from_mut(word).cast()).collect();
        let [grid, block] = [config.grid, config.block].map(|[x, y, z]| (x, y, z));
        // SAFETY: the driver copies one value per parameter out of the words before it returns, and
        // callers pass what the kernel has.
        unsafe {
            let shared = config.shared_bytes;
            result::launch_kernel(function, grid, block, shared, self.stream, &mut pointers)
        }
        .map_err(|e| error(&format!("launching {}", kernel.function), e))
    }

    fn multiply(&self, product: &Product) -> Result<bool, GpuError> {
        self.enter()?;
        let cublas = self.cublas.get_or_init(|| {
            let opened = self.alloc(CublasLt::WORKSPACE_BYTES).ok().and_then(CublasLt::open);
            if opened.is_none() {
                tracing::info!("cuBLASLt is not installed; dense products use our own kernels");
            }
            opened
        });
        let Some(cublas) = cublas else { return Ok(false) };
        let failed = |text| GpuError::Driver { call: "cublasLtMatmul".to_owned(), text };
        cublas.multiply(product, self.stream).map_err(failed)
    }

    fn synchronize(&self) -> Result<(), GpuError> {
        self.enter()?;
        // SAFETY: the stream lives as long as `self`.
        unsafe { result::stream::synchronize(self.stream) }
            .map_err(|e| error("cuStreamSynchronize", e))
    }

    fn begin_capture(&self) -> Result<(), GpuError> {
        self.enter()?;
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is not being captured: `Gpu::capture` ends what it begins.
        unsafe { result::stream::begin_capture(self.stream, mode) }
            .map_err(|e| error("cuStreamBeginCapture", e))
    }

    fn end_capture(&self) -> Result<Graph, GpuError> {
        self.enter()?;
        // SAFETY: the stream is being captured; the graph is destroyed once, after it was
        // instantiated.
        let executable = unsafe {
            let graph = result::stream::end_capture(self.stream)
                .map_err(|e| error("cuStreamEndCapture", e))?;
            if graph.is_null() {
                let text = "the recording was invalidated".to_owned();
                return Err(GpuError::Driver { call: "cuStreamEndCapture".to_owned(), text });
            }
            let flags = sys::CUgraphInstantiate_flags(0);
            let executable = result::graph::instantiate(graph, flags);
            let _ = result::graph::destroy(graph);
            executable.map_err(|e| error("cuGraphInstantiate", e))?
        };
        Ok(Graph { recording: Box::new(Executable(executable)) })
    }

    fn replay(&self, graph: &Graph) -> Result<(), GpuError> {
        self.enter()?;
        let executable = graph.recording.downcast_ref::<Executable>();
        let executable = executable.expect("the card's own recording");
        // SAFETY: graph and stream are live.
        unsafe { result::graph::launch(executable.0, self.stream) }
            .map_err(|e| error("cuGraphLaunch", e))
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        let staging = self.staging.get_mut().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: nobody has any of the handles any more; each is destroyed once. Errors mean that
        // the card is gone already.
        unsafe {
            let _ = result::ctx::set_current(self.context);
            let _ = result::stream::synchronize(self.stream);
            let _ = result::free_host(staging.memory.cast());
            let _ = result::free_host(staging.results.cast());
            let _ = result::free_host(staging.begun.cast());
            for event in staging.events.into_iter().chain([staging.arrived]) {
                let _ = result::event::destroy(event);
            }
            for (_, module) in &self.modules {
                let _ = result::module::unload(*module);
            }
            let _ = result::stream::destroy(self.stream);
            let _ = result::primary_ctx::release(self.device);
        }
    }
}
