//! Access to the values behind a tensor inside an op.

use candle_core::{CpuStorage, Layout, Result, WithDType, bail};

/// The values of a contiguous CPU tensor.
pub(super) fn contiguous<'a, T: WithDType>(
    name: &str,
    storage: &'a CpuStorage,
    layout: &Layout,
) -> Result<&'a [T]> {
    let Some((start, end)) = layout.contiguous_offsets() else {
        bail!("{name} must be contiguous, has strides {:?}", layout.stride())
    };
    Ok(&storage.as_slice::<T>()?[start..end])
}
