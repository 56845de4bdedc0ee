//! Runs the kernels on the processor, from the same source, thread by thread.
//!
//! Memory is the program's own. Each allocation begins filled with NaNs and lies between two guard
//! zones that are looked at after every launch, so that a kernel that reads what nobody wrote, or
//! writes where it must not, does not go unnoticed.

use std::collections::BTreeMap;
use std::ffi::{CStr, CString, c_char, c_void};
use std::mem::transmute;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use super::backend::{Backend, Graph, Properties};
use super::{ALIGNMENT, GpuError, Kernel, LaunchConfig};

/// Bytes that nobody may touch before and behind each allocation.
const GUARD_BYTES: usize = 1024;
/// What fresh and guarded memory holds: NaN in every float format, and no valid index.
const POISON: u8 = 0xff;
/// Claimed, so that the code that fills a card is used on small shapes.
const NUM_MULTIPROCESSORS: usize = 4;
const MEMORY_BYTES: usize = 8 << 30;
const ERROR_BYTES: usize = 1024;

/// As `kernels/emulation/emulation.h` has it.
#[repr(C)]
struct EmulatedLaunch {
    grid: [u32; 3],
    block: [u32; 3],
    shared_bytes: u32,
    error: *mut c_char,
    error_bytes: usize,
}

type Entry = unsafe extern "C" fn(*const EmulatedLaunch, *const *mut c_void);

pub(super) struct Emulator {
    properties: Properties,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    allocations: BTreeMap<u64, Allocation>,
    /// What is recorded, while something is.
    recording: Option<Vec<Recorded>>,
    /// See [`Backend::begin_download`].
    downloaded: Vec<u8>,
}

/// An allocation with its guard zones.
struct Allocation {
    bytes: Vec<u8>,
    /// Where the part between the guard zones begins.
    start: usize,
    len: usize,
}

#[derive(Clone)]
enum Recorded {
    Launch(Kernel, LaunchConfig, Vec<u64>),
    Copy { to: u64, from: u64, num_bytes: usize },
    Zero { at: u64, num_bytes: usize },
}

impl Allocation {
    fn new(len: usize) -> Self {
        let mut bytes = vec![POISON; len + 2 * GUARD_BYTES + ALIGNMENT];
        let start = GUARD_BYTES + bytes[GUARD_BYTES..].as_mut_ptr().align_offset(ALIGNMENT);
        Self { bytes, start, len }
    }

    fn address(&self) -> u64 {
        self.bytes[self.start..].as_ptr().addr() as u64
    }

    /// Which guard zone was written to.
    fn damage(&self) -> Option<&'static str> {
        let is_damaged = |bytes: &[u8]| bytes.iter().any(|byte| *byte != POISON);
        let (before, behind) = (&self.bytes[..self.start], &self.bytes[self.start + self.len..]);
        match (is_damaged(before), is_damaged(behind)) {
            (true, _) => Some("before"),
            (_, true) => Some("behind"),
            _ => None,
        }
    }
}

impl State {
    /// The bytes at an address, if all lie in one allocation.
    fn bytes_mut(&mut self, at: u64, num_bytes: usize) -> Result<&mut [u8], GpuError> {
        let outside = GpuError::Driver {
            call: "copy".to_owned(),
            text: format!("{num_bytes} bytes at {at:#x} are not in one allocation"),
        };
        let Some((&address, allocation)) = self.allocations.range_mut(..=at).next_back() else {
            return Err(outside);
        };
        let first = (at - address) as usize;
        if allocation.len < first + num_bytes {
            return Err(outside);
        }
        let start = allocation.start + first;
        Ok(&mut allocation.bytes[start..start + num_bytes])
    }

    fn check_guards(&self, kernel: Kernel) -> Result<(), GpuError> {
        for allocation in self.allocations.values() {
            if let Some(side) = allocation.damage() {
                let text = format!("wrote {side} a buffer of {} bytes", allocation.len);
                return Err(GpuError::Kernel { kernel: kernel.function, text });
            }
        }
        Ok(())
    }

    fn run(&mut self, recorded: &Recorded) -> Result<(), GpuError> {
        match recorded {
            Recorded::Launch(kernel, config, args) => {
                run_kernel(*kernel, *config, args)?;
                self.check_guards(*kernel)
            }
            Recorded::Copy { to, from, num_bytes } => {
                let bytes = self.bytes_mut(*from, *num_bytes)?.to_vec();
                self.bytes_mut(*to, *num_bytes)?.copy_from_slice(&bytes);
                Ok(())
            }
            Recorded::Zero { at, num_bytes } => {
                self.bytes_mut(*at, *num_bytes)?.fill(0);
                Ok(())
            }
        }
    }
}

impl Emulator {
    pub(super) fn new() -> Self {
        let properties = Properties {
            name: "emulation".to_owned(),
            capability: (8, 0),
            num_multiprocessors: NUM_MULTIPROCESSORS,
            max_shared_bytes: 163 << 10,
            l2_bytes: 40 << 20,
            is_emulated: true,
        };
        Self { properties, state: Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs it now, or later if something is being recorded.
    fn queue(&self, what: Recorded) -> Result<(), GpuError> {
        let mut state = self.state();
        if let Some(recording) = &mut state.recording {
            recording.push(what);
            return Ok(());
        }
        state.run(&what)
    }
}

impl Backend for Emulator {
    fn properties(&self) -> &Properties {
        &self.properties
    }

    fn memory_info(&self) -> Result<(usize, usize), GpuError> {
        let used: usize = self.state().allocations.values().map(|found| found.len).sum();
        Ok((MEMORY_BYTES.saturating_sub(used), MEMORY_BYTES))
    }

    fn alloc(&self, num_bytes: usize) -> Result<u64, GpuError> {
        if self.memory_info()?.0 < num_bytes {
            return Err(GpuError::OutOfMemory { num_bytes });
        }
        let allocation = Allocation::new(num_bytes);
        let address = allocation.address();
        self.state().allocations.insert(address, allocation);
        Ok(address)
    }

    fn free(&self, address: u64) {
        let mut state = self.state();
        // A recording keeps what it uses, as a workspace does whose ranges it names.
        if state.recording.is_none() {
            state.allocations.remove(&address);
        }
    }

    fn upload(&self, to: u64, bytes: &[u8]) -> Result<(), GpuError> {
        let mut state = self.state();
        if state.recording.is_some() {
            let text = "the copy would become part of the recording".to_owned();
            return Err(GpuError::Driver { call: "upload".to_owned(), text });
        }
        state.bytes_mut(to, bytes.len())?.copy_from_slice(bytes);
        Ok(())
    }

    fn download(&self, from: u64, bytes: &mut [u8]) -> Result<(), GpuError> {
        bytes.copy_from_slice(self.state().bytes_mut(from, bytes.len())?);
        Ok(())
    }

    fn begin_download(&self, from: u64, num_bytes: usize) -> Result<(), GpuError> {
        let mut state = self.state();
        state.downloaded = state.bytes_mut(from, num_bytes)?.to_vec();
        Ok(())
    }

    fn end_download(&self, bytes: &mut [u8]) -> Result<(), GpuError> {
        bytes.copy_from_slice(&self.state().downloaded[..bytes.len()]);
        Ok(())
    }

    fn copy(&self, to: u64, from: u64, num_bytes: usize) -> Result<(), GpuError> {
        self.queue(Recorded::Copy { to, from, num_bytes })
    }

    fn zero(&self, at: u64, num_bytes: usize) -> Result<(), GpuError> {
        self.queue(Recorded::Zero { at, num_bytes })
    }

    fn launch(&self, kernel: Kernel, config: LaunchConfig, args: &[u64]) -> Result<(), GpuError> {
        self.queue(Recorded::Launch(kernel, config, args.to_vec()))
    }

    fn synchronize(&self) -> Result<(), GpuError> {
        Ok(())
    }

    fn begin_capture(&self) -> Result<(), GpuError> {
        self.state().recording = Some(Vec::new());
        Ok(())
    }

    fn end_capture(&self) -> Result<Graph, GpuError> {
        let recording = self.state().recording.take().unwrap_or_default();
        Ok(Graph { recording: Box::new(recording) })
    }

    fn replay(&self, graph: &Graph) -> Result<(), GpuError> {
        let recording = graph.recording.downcast_ref::<Vec<Recorded>>();
        for recorded in recording.expect("the emulation's own recording") {
            self.queue(recorded.clone())?;
        }
        Ok(())
    }
}

/// Runs all threads of a kernel.
fn run_kernel(kernel: Kernel, config: LaunchConfig, args: &[u64]) -> Result<(), GpuError> {
    let entry = find(kernel)?;
    let mut words = args.to_vec();
    let pointers: Vec<*mut c_void> =
        words.iter_mut().map(|word| std::ptr::from_mut(word).cast()).collect();
    let mut error = [0_u8; ERROR_BYTES];
    let launch = EmulatedLaunch {
        grid: config.grid,
        block: config.block,
        shared_bytes: config.shared_bytes,
        error: error.as_mut_ptr().cast(),
        error_bytes: error.len(),
    };
    // SAFETY: the entry reads one word per parameter, and the callers pass what the kernel has;
    // the words and the error text outlive the call. What a kernel does with the addresses is
    // what the emulation is there to find out.
    unsafe { entry(&raw const launch, pointers.as_ptr()) };
    let text =
        CStr::from_bytes_until_nul(&error).map_or_else(|_| "?".into(), CStr::to_string_lossy);
    if text.is_empty() {
        return Ok(());
    }
    Err(GpuError::Kernel { kernel: kernel.function, text: text.into_owned() })
}

/// The entry point of a kernel in the library that the build made.
fn find(kernel: Kernel) -> Result<Entry, GpuError> {
    static LIBRARY: OnceLock<usize> = OnceLock::new();
    let library = *LIBRARY.get_or_init(|| {
        let path = CString::new(env!("EMULATED_KERNELS")).expect("a path without zeros");
        // SAFETY: opens a library that this build made; it has no constructors that do anything.
        unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) }.addr()
    });
    let name = CString::new(format!("emulate_{}", kernel.function)).expect("no zeros in a name");
    let library = std::ptr::with_exposed_provenance_mut::<c_void>(library);
    let entry = if library.is_null() {
        std::ptr::null_mut()
    } else {
        // SAFETY: the handle is open for the life of the program.
        unsafe { libc::dlsym(library, name.as_ptr()) }
    };
    if entry.is_null() {
        let text = format!("is not in {}", env!("EMULATED_KERNELS"));
        return Err(GpuError::Kernel { kernel: kernel.function, text });
    }
    // SAFETY: `KERNEL` gives every function of this name this type.
    Ok(unsafe { transmute::<*mut c_void, Entry>(entry) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::gpu::{Arg, DeviceBuffer, Gpu};

    const NUM_THREADS: usize = 64;

    /// Runs one of `kernels/emulation/planted.cpp` in two blocks: whether both passed the values on
    /// as they should, or what the emulation says.
    fn run(function: &'static str, ring: usize, mistake: i32) -> Result<bool, String> {
        let gpu = Gpu::emulated();
        let x: Vec<f32> = (0..NUM_THREADS).map(|i| i as f32).collect();
        let x: DeviceBuffer = gpu.alloc_from(bytemuck::cast_slice(&x)).unwrap();
        let out = gpu.alloc(2 * NUM_THREADS * size_of::<f32>()).unwrap();
        let num_values = if function == "planted_copy" { 2 * NUM_THREADS } else { NUM_THREADS };
        let config = LaunchConfig {
            shared_bytes: (num_values * size_of::<f32>()) as u32,
            ..LaunchConfig::linear(2, NUM_THREADS as u32)
        };
        let args = [Arg::Buffer(&x), Arg::Buffer(&out), Arg::I32(mistake)];
        gpu.launch(Kernel { module: "planted", function }, config, &args)
            .map_err(|error| error.to_string())?;
        let found = bytemuck::pod_collect_to_vec::<u8, f32>(&out.download().unwrap());
        let next = |i: usize| i / ring * ring + (i + 1) % ring;
        let is_right = |(i, found): (usize, &f32)| *found == next(i % NUM_THREADS) as f32;
        Ok(found.iter().enumerate().all(is_right))
    }

    /// Goal: a test on the emulation can be trusted. Method: right kernels give what they should,
    /// and the same without a barrier, or without waiting for a copy, give something else.
    #[test]
    fn a_missing_barrier_shows_in_the_result() {
        for function in ["planted_shift", "planted_static_shift", "planted_reuse", "planted_copy"] {
            assert_eq!(run(function, NUM_THREADS, 0), Ok(true), "{function}");
            assert_eq!(run(function, NUM_THREADS, 1), Ok(false), "{function}");
        }
        assert_eq!(run("planted_copy", NUM_THREADS, 2), Ok(false));
        assert_eq!(run("planted_exchange", 32, 0), Ok(true));
    }

    #[test]
    fn what_a_card_would_hang_on_is_an_error_that_names_the_thread() {
        let expected = [
            "of its warp waits for it at __shfl_sync",
            "of its warp waits at __syncwarp",
            "takes a value from lane 20, which is not in the mask",
            "ends while others wait at __syncthreads",
            "of its warp waits for it at __shfl_sync",
            "waits for ever at barrier 1",
            "thread (9, 0, 0): accesses the address",
            "thread (9, 0, 0): accesses memory that is not aligned",
            "indexes an array outside of its bounds",
        ];
        for (mistake, expected) in (1..).zip(expected) {
            let error = run("planted_exchange", 32, mistake).unwrap_err();
            let names_the_place = error.contains("block (") && error.contains("thread (");
            assert!(error.contains(expected) && names_the_place, "{mistake}: {error}");
        }
        let error = run("planted_shift", NUM_THREADS, 2).unwrap_err();
        assert!(error.contains("written byte 0 behind its shared memory"), "{error}");
    }
}
