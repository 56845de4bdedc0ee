//! From the device that was asked for to one that is there.

use anyhow::Result;

use crate::cli::Hinted;
use crate::config::DeviceChoice;
use crate::device::Device;
use crate::device::gpu::{Gpu, GpuError};

/// An opened device, and why it is not a better one.
pub(in crate::cli) struct Opened {
    pub(in crate::cli) device: Device,
    pub(in crate::cli) why_not_gpu: Option<String>,
}

/// Opens the device. `auto` takes the first card, or else the processor.
///
/// # Errors
/// If a card was asked for by number and cannot be used.
pub(in crate::cli) fn open(choice: DeviceChoice) -> Result<Opened> {
    let cpu = |why_not_gpu| Ok(Opened { device: Device::Cpu, why_not_gpu });
    let number = match choice {
        DeviceChoice::Cpu => return cpu(None),
        DeviceChoice::Auto => 0,
        DeviceChoice::Cuda(number) => number,
    };
    match (Gpu::open(number), choice) {
        (Ok(gpu), _) => Ok(Opened { device: Device::Gpu(gpu), why_not_gpu: None }),
        // A build for the processor does not miss anything.
        (Err(GpuError::NotBuilt), DeviceChoice::Auto) => cpu(None),
        (Err(error), DeviceChoice::Auto) => cpu(Some(error.to_string())),
        (Err(error), _) => Err(Hinted {
            message: format!("cannot compute on `{choice}`: {error}"),
            hint: "leave `--device` away, or pass `--device cpu`, to compute on the processor"
                .into(),
        }
        .into()),
    }
}
