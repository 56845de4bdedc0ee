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
        self.state().bytes_mut(to, bytes.len())?.copy_from_slice(bytes);
        Ok(())
    }

    fn download(&self, from: u64, bytes: &mut [u8]) -> Result<(), GpuError> {
        bytes.copy_from_slice(self.state().bytes_mut(from, bytes.len())?);
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
    // SAFETY: the handle is open for the life of the program.
    let entry = if library.is_null() {
        std::ptr::null_mut()
    } else {
        unsafe { libc::dlsym(library, name.as_ptr()) }
    };
    if entry.is_null() {
        let text = format!("is not in {}", env!("EMULATED_KERNELS"));
        return Err(GpuError::Kernel { kernel: kernel.function, text });
    }
    // SAFETY: `KERNEL` gives every function of this name this type.
    Ok(unsafe { transmute::<*mut c_void, Entry>(entry) })
}
