//! Index vectors of a step: ids, positions, slots, block tables.

use std::ops::{Deref, DerefMut};

use candle_core::{Result, bail};

use crate::device::gpu::DeviceBuffer;

/// An index vector, in the program's memory and, where a card computes the step, in the card's.
#[derive(Clone, Debug, Default)]
pub struct Indices {
    values: Vec<u32>,
    resident: Option<DeviceBuffer>,
}

impl Indices {
    /// Copies the values to the beginning of a buffer, which may be longer. What the card reads is
    /// what the values are now.
    ///
    /// # Errors
    /// If the copy fails.
    pub fn upload_to(&mut self, buffer: DeviceBuffer) -> Result<()> {
        buffer.upload(bytemuck::cast_slice(&self.values))?;
        self.resident = Some(buffer);
        Ok(())
    }

    /// Says that a buffer holds the values already.
    pub fn set_resident(&mut self, buffer: DeviceBuffer) {
        self.resident = Some(buffer);
    }

    /// Where the card finds them.
    ///
    /// # Errors
    /// If they were not uploaded, or changed since.
    pub fn on_gpu(&self) -> Result<&DeviceBuffer> {
        match &self.resident {
            Some(buffer) => Ok(buffer),
            None => bail!("the step's indices are not on the GPU"),
        }
    }
}

impl From<Vec<u32>> for Indices {
    fn from(values: Vec<u32>) -> Self {
        Self { values, resident: None }
    }
}

impl FromIterator<u32> for Indices {
    fn from_iter<I: IntoIterator<Item = u32>>(values: I) -> Self {
        values.into_iter().collect::<Vec<_>>().into()
    }
}

impl PartialEq for Indices {
    fn eq(&self, other: &Self) -> bool {
        self.values == other.values
    }
}

impl Eq for Indices {}

impl Deref for Indices {
    type Target = Vec<u32>;

    fn deref(&self) -> &Vec<u32> {
        &self.values
    }
}

impl DerefMut for Indices {
    /// The card's copy is forgotten: it would be out of date.
    fn deref_mut(&mut self) -> &mut Vec<u32> {
        self.resident = None;
        &mut self.values
    }
}
