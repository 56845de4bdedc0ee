//! GPTQ and AWQ: `weight[row, column] = scale[group, row] * (q[column, row] - zero[group, row])`,
//! where a group is some neighbouring columns.
//!
//! Sources: AutoGPTQ's and GPTQModel's `QuantLinear`, AutoAWQ's `WQLinear_GEMM`.
//! - GPTQ, version 1, stores `zero - 1`, modulo the number of integers; version 2 stores `zero`.
//!   Symmetric checkpoints of either kind are published as version 1, but their zero point can only
//!   be the middle, so both are read as that.
//! - With `desc_act` columns were quantised in the order of their importance. `g_idx` tells the
//!   group of each column, and groups are no neighbours: the columns are put in order here, and the
//!   activations when the model runs.
//! - AWQ's words hold eight rows in an order that suited its kernel.

use std::sync::Arc;

use candle_core::quantized::GgmlDType;
use half::f16;

use super::{
    CheckpointError, Content, JsonFile, Repository, RepositoryError, StoredMatrix, check_shape,
    floats, renamed,
};
use crate::weights::gguf::shown;
use crate::weights::safetensors::ElementType;
use crate::weights::tensor_bytes::TensorBytes;

/// Columns that share a scale in the forms that matrices are computed with.
const BLOCK: usize = 32;
/// Which of eight rows is in each four bits of AWQ's words, from the lowest.
const AWQ_ORDER: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];

/// How integers share a word of 32 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packing {
    /// Neighbouring columns, the first one lowest: `[num_cols / integers in a word, num_rows]`.
    Columns,
    /// Eight neighbouring rows, of which the lowest bits are this one's, and so on: `[num_cols,
    /// num_rows / 8]`.
    Rows([usize; 8]),
}

/// The settings of GPTQ or AWQ.
#[derive(Clone, Debug, PartialEq)]
pub(in crate::weights) struct Grouped {
    pub(super) bits: u32,
    /// Columns of a group; `None` has one group for all of them.
    group_size: Option<usize>,
    /// Whether all zero points are the middle.
    is_symmetric: bool,
    /// Whether the columns of a group need not be neighbours.
    has_order: bool,
    packing: Packing,
    /// Whether zero points are stored less one.
    is_shifted: bool,
}

/// The integers of a matrix and what they mean.
#[derive(Clone, Debug)]
pub struct GroupedWeights {
    /// Bits of an integer: 4 or 8.
    pub bits: u32,
    /// How they share words.
    pub packing: Packing,
    /// Columns of a group, of the last one maybe fewer; a multiple of 32.
    pub group_size: usize,
    /// `[groups][rows]`
    pub zeros: Vec<u8>,
    /// `[groups][rows]`
    pub scales: Vec<f16>,
    /// Which stored column is the first, the second and so on; `None` if they are in order.
    pub order: Option<Arc<[u32]>>,
}

impl Grouped {
    pub(super) fn gptq(settings: &JsonFile) -> Result<Self, RepositoryError> {
        let format = settings.optional_str("checkpoint_format")?.unwrap_or("gptq");
        if !["gptq", "gptq_v2"].contains(&format)
            || settings.optional_bool("is_marlin_format")? == Some(true)
        {
            return Err(settings.unsupported(format!("the GPTQ format `{}`", shown(format))));
        }
        if settings.value()["dynamic"].as_object().is_some_and(|rules| !rules.is_empty()) {
            return Err(settings.unsupported("GPTQ with settings of single layers (`dynamic`)"));
        }
        if let Some(pack) = settings.optional_str("pack_dtype")?.filter(|pack| *pack != "int32") {
            return Err(settings.unsupported(format!("GPTQ packed as `{}`", shown(pack))));
        }
        let bits = settings.size("bits")?;
        if ![4, 8].contains(&bits) {
            return Err(settings.unsupported(format!("GPTQ with {bits} bits (4 and 8 are)")));
        }
        Ok(Self {
            bits: bits as u32,
            group_size: group_size(settings, renamed(settings, ["group_size", "groupsize"])?)?,
            is_symmetric: settings.optional_bool("sym")?.unwrap_or(true),
            has_order: settings.optional_bool("desc_act")?.unwrap_or(false),
            packing: Packing::Columns,
            is_shifted: format == "gptq",
        })
    }

    pub(super) fn awq(settings: &JsonFile) -> Result<Self, RepositoryError> {
        let version = settings.optional_str("version")?.unwrap_or("gemm");
        if !version.eq_ignore_ascii_case("gemm") {
            let version = shown(version);
            return Err(settings.unsupported(format!("the AWQ version `{version}` (`gemm` is)")));
        }
        let bits = renamed(settings, ["bits", "w_bit"])?;
        if bits != 4 {
            return Err(settings.unsupported(format!("AWQ with {bits} bits (4 are)")));
        }
        if settings.optional_bool("zero_point")? == Some(false) {
            return Err(settings.unsupported("AWQ without zero points"));
        }
        let size = renamed(settings, ["group_size", "q_group_size"])?;
        Ok(Self {
            bits: 4,
            group_size: group_size(settings, size)?,
            is_symmetric: false,
            has_order: false,
            packing: Packing::Rows(AWQ_ORDER),
            is_shifted: false,
        })
    }

    pub(super) fn name(&self) -> String {
        let method = if self.packing == Packing::Columns { "GPTQ" } else { "AWQ" };
        let groups = match self.group_size {
            Some(size) => format!("groups of {size}"),
            None => "whole rows".to_owned(),
        };
        let symmetry = if self.is_symmetric { "symmetric" } else { "asymmetric" };
        let order = if self.has_order { ", ordered by activation" } else { "" };
        format!("{method} int{}, {groups}, {symmetry}{order}", self.bits)
    }

    /// The form that loses nothing: with a fixed offset where zero points are the middle, otherwise
    /// with the differences to the zero points. Of eight bits those need nine, so they are floats.
    pub(super) fn dtype(&self) -> GgmlDType {
        match (self.bits, self.is_symmetric) {
            (4, true) => GgmlDType::Q4_0,
            (4, false) => GgmlDType::Q5_0,
            (_, true) => GgmlDType::Q8_0,
            (_, false) => GgmlDType::F16,
        }
    }

    pub(super) fn matrix(
        &self,
        repository: &Repository,
        module: &str,
        (num_rows, num_cols): (usize, usize),
    ) -> Result<StoredMatrix, CheckpointError> {
        let per_word = 32 / self.bits as usize;
        if !num_cols.is_multiple_of(BLOCK) || !num_rows.is_multiple_of(per_word) {
            let what =
                format!("belongs to {num_rows} x {num_cols} weights, no multiple of {BLOCK}");
            return Err(repository.complaint(&format!("{module}.qweight"), &what).into());
        }
        let group_size = self.group_size.unwrap_or(num_cols);
        let num_groups = num_cols.div_ceil(group_size);
        let words_shape = match self.packing {
            Packing::Columns => [num_cols / per_word, num_rows],
            Packing::Rows(_) => [num_cols, num_rows / per_word],
        };
        let bytes = words(repository, &format!("{module}.qweight"), &words_shape)?;
        let scales_name = format!("{module}.scales");
        let (info, scales) = floats(repository, &scales_name)?;
        check_shape(&info, &[num_groups, num_rows])?;
        let scales: Vec<f16> = scales.into_iter().map(f16::from_f32).collect();
        if scales.iter().any(|scale| !scale.is_finite()) {
            let what = "holds a scale that is too large for half precision";
            return Err(repository.complaint(&scales_name, what).into());
        }
        let zeros = self.zeros(repository, module, [num_groups, num_rows])?;
        let order = self.order(repository, module, (num_cols, group_size))?;
        let grouped = GroupedWeights {
            bits: self.bits,
            packing: self.packing,
            group_size,
            zeros,
            scales,
            order,
        };
        Ok(StoredMatrix {
            dtype: self.dtype(),
            quantize_to: None,
            num_rows,
            num_cols,
            bytes,
            content: Content::Grouped(Arc::new(grouped)),
        })
    }

    /// The zero points, unpacked.
    fn zeros(
        &self,
        repository: &Repository,
        module: &str,
        [num_groups, num_rows]: [usize; 2],
    ) -> Result<Vec<u8>, CheckpointError> {
        let name = format!("{module}.qzeros");
        let per_word = 32 / self.bits as usize;
        let bytes = words(repository, &name, &[num_groups, num_rows / per_word])?;
        let top = u32::MAX >> (32 - self.bits);
        let mut zeros = Vec::with_capacity(num_groups * num_rows);
        for word in bytes.as_ref().as_chunks::<4>().0 {
            let word = u32::from_le_bytes(*word);
            let mut place = [0; 8];
            for (i, place) in place.iter_mut().enumerate().take(per_word) {
                *place = word >> (self.bits * i as u32) & top;
            }
            let place_of = |i: usize| match self.packing {
                Packing::Columns => i,
                Packing::Rows(order) => order.iter().position(|row| *row == i).unwrap_or(i),
            };
            zeros.extend((0..per_word).map(|i| place[place_of(i)] as u8));
        }
        let middle = 1 << (self.bits - 1);
        if !self.is_symmetric {
            if self.is_shifted {
                for zero in &mut zeros {
                    *zero = zero.wrapping_add(1) & top as u8;
                }
            }
            return Ok(zeros);
        }
        let first = zeros.first().copied().unwrap_or(middle);
        if ![middle, middle - 1].contains(&first) || zeros.iter().any(|zero| *zero != first) {
            let what = "holds zero points that are not the middle, though `sym` says so";
            return Err(repository.complaint(&name, what).into());
        }
        zeros.fill(middle);
        Ok(zeros)
    }

    /// The order of columns by their groups, if they are not in it.
    fn order(
        &self,
        repository: &Repository,
        module: &str,
        (num_cols, group_size): (usize, usize),
    ) -> Result<Option<Arc<[u32]>>, CheckpointError> {
        let name = format!("{module}.g_idx");
        let is_there = self.packing == Packing::Columns && repository.info(&name).is_some();
        if !is_there && !self.has_order {
            return Ok(None);
        }
        let bytes = words(repository, &name, &[num_cols])?;
        let groups = bytes.as_ref().as_chunks::<4>().0.iter().map(|word| u32::from_le_bytes(*word));
        let groups: Vec<u32> = groups.collect();
        let mut order: Vec<u32> = (0..num_cols as u32).collect();
        order.sort_by_key(|column| groups[*column as usize]);
        let is_full = |(place, column): (usize, &u32)| {
            groups[*column as usize] as usize == place / group_size
        };
        if !order.iter().enumerate().all(is_full) {
            let what = format!("does not put {group_size} columns into each group");
            return Err(repository.complaint(&name, &what).into());
        }
        Ok((!order.is_sorted()).then(|| order.into()))
    }
}

/// A tensor of words of 32 bits.
fn words(
    repository: &Repository,
    name: &str,
    shape: &[usize],
) -> Result<TensorBytes, CheckpointError> {
    let (info, bytes) = repository.tensor(name)?;
    if ![ElementType::I32, ElementType::U32].contains(&info.dtype) {
        let what = format!("is stored as {}, not as I32", info.dtype.name());
        return Err(repository.complaint(name, &what).into());
    }
    check_shape(info, shape)?;
    Ok(bytes)
}

fn group_size(settings: &JsonFile, size: i64) -> Result<Option<usize>, RepositoryError> {
    match usize::try_from(size) {
        Err(_) if size == -1 => Ok(None),
        Ok(size) if 0 < size && size.is_multiple_of(BLOCK) => Ok(Some(size)),
        _ => {
            Err(settings.unsupported(format!("a group size of {size} (multiples of {BLOCK} are)")))
        }
    }
}
