//! How one product is cut into tasks, and in which order a task meets panels and tokens.

use std::mem::MaybeUninit;
use std::ops::Range;

use super::activations::{Activations, Group};
use super::format::{BLOCK, GROUP_BYTES, max_unpacked_bytes};
use super::kernel::{Kernels, MAX_WIDTH, PairKernel, PanelArgs, PanelKernel, Tile};
use super::simd::LANES;
use super::{PackedMatrix, Segment, SharedMut};
use crate::device::threads::{current_num_threads, parallel_for};
use crate::ops::silu_mul::SiluMul;
use crate::ops::simd::Isa;

/// Up to this many tokens the kernels read the packed weights themselves; beyond, each panel is
/// unpacked first.
const MAX_DIRECT_TOKENS: usize = 24;
/// Activations that one task goes over for each panel; they should stay in the second-level cache.
const TILE_BYTES: usize = 512 << 10;
/// Blocks of a panel that are unpacked at a time; they should stay in the first-level cache. A
/// multiple of the eight blocks that share scales.
const CHUNK_BLOCKS: usize = 16;
/// Tasks for each thread: enough to even out threads of unequal speed.
const TASKS_PER_THREAD: usize = 8;
/// A larger output does not stay in the second-level cache.
const OUTPUT_BYTES: usize = 1 << 20;
const CACHE_LINE: usize = 64;

/// Where the sums of two panels begin.
static ZEROS: [Tile; 2] = [[[0.0; LANES]; MAX_WIDTH]; 2];

/// What becomes of the sums.
#[derive(Clone, Copy)]
pub(super) enum Epilogue<'a> {
    /// They are the output.
    Store,
    /// A number for each row is added.
    AddBias(&'a [f32]),
    /// The matrix has two segments of equal shape, gates and values: the output is
    /// `silu(gate) * value`.
    SiluMul(Isa),
}

/// One product.
pub(super) struct Plan<'a> {
    pub(super) w: &'a PackedMatrix,
    /// Of each segment.
    pub(super) kernels: Vec<Kernels>,
    pub(super) groups: &'a [Group],
    /// Of each group.
    pub(super) activations: &'a [Activations],
    pub(super) epilogue: Epilogue<'a>,
    /// `[token][row]`.
    pub(super) output: SharedMut<f32>,
    /// Rows of the output.
    pub(super) num_rows: usize,
}

/// One or two panels that are computed together, as segment and number in the segment.
#[derive(Clone, Copy)]
struct Couple {
    first: (usize, usize),
    second: Option<(usize, usize)>,
}

/// Consecutive blocks of a couple's panels, or columns for floats, and the code for them.
struct Slice<'a> {
    weights: [*const u8; 2],
    blocks: [Range<usize>; 2],
    by_width: [&'a [PanelKernel; 4]; 2],
    pair: Option<PairKernel>,
    /// Weights that are needed after these.
    ahead: Ahead,
}

/// Cache lines to ask for during other work, from one or two panels.
#[derive(Clone, Copy, Default)]
struct Ahead {
    integers: [Option<*const u8>; 2],
    num_integer_lines: usize,
    scales: [Option<*const u8>; 2],
    num_scale_lines: usize,
}

impl Ahead {
    /// Asks for one of `num_parts` parts.
    fn fetch(&self, part: usize, num_parts: usize) {
        for (from, num_lines) in
            [(self.scales, self.num_scale_lines), (self.integers, self.num_integer_lines)]
        {
            for line in num_lines * part / num_parts..num_lines * (part + 1) / num_parts {
                for from in from.into_iter().flatten() {
                    prefetch(from.wrapping_add(line * CACHE_LINE));
                }
            }
        }
    }
}

fn prefetch(address: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every x86-64 processor has the instruction, and it does not fault.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(address.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}

/// What a task needs besides its input.
struct Workspace {
    /// A chunk of two unpacked panels.
    scratch: Vec<CacheLine>,
    /// Sums of two panels for each group.
    tiles: Vec<[Tile; 2]>,
}

#[derive(Clone, Copy)]
#[repr(align(64))]
struct CacheLine {
    _bytes: [u8; GROUP_BYTES],
}

impl Workspace {
    fn new(num_groups: usize, is_direct: bool) -> Self {
        let num_bytes = if is_direct { 0 } else { 2 * max_unpacked_bytes(CHUNK_BLOCKS) };
        let line = CacheLine { _bytes: [0; GROUP_BYTES] };
        Self { scratch: vec![line; num_bytes / GROUP_BYTES], tiles: vec![ZEROS; num_groups] }
    }
}

impl Plan<'_> {
    /// A task is a range of couples for a range of groups; within it each couple meets all groups.
    pub(super) fn run(&self) {
        let group_bytes = MAX_WIDTH * self.w.num_cols;
        let groups_per_tile = (TILE_BYTES / group_bytes.max(1)).max(1);
        let num_tiles = self.groups.len().div_ceil(groups_per_tile);
        let num_couples = self.num_couples();
        let num_tasks = current_num_threads() * TASKS_PER_THREAD;
        let couples_per_task = num_couples.div_ceil(num_tasks).max(1);
        let num_parts = num_couples.div_ceil(couples_per_task);
        parallel_for(num_tiles * num_parts, |task| {
            let tile = task / num_parts * groups_per_tile;
            let tile = tile..self.groups.len().min(tile + groups_per_tile);
            let first = task % num_parts * couples_per_task;
            let last = num_couples.min(first + couples_per_task);
            let mut workspace = Workspace::new(tile.len(), self.is_direct());
            for couple in first..last {
                self.run_couple(couple, tile.clone(), &mut workspace);
            }
        });
    }

    /// Few tokens: panels are not unpacked.
    fn is_direct(&self) -> bool {
        self.groups.last().is_none_or(|last| last.first + last.width <= MAX_DIRECT_TOKENS)
    }

    fn output_len(&self) -> usize {
        self.groups.last().map_or(0, |last| (last.first + last.width) * self.num_rows)
    }

    fn num_couples(&self) -> usize {
        match self.epilogue {
            Epilogue::SiluMul(_) => self.w.segments[0].num_panels(),
            _ => self.w.segments.iter().map(|segment| segment.num_panels().div_ceil(2)).sum(),
        }
    }

    /// Neighbours in a segment, or gate and value of the same rows.
    fn couple(&self, index: usize) -> Option<Couple> {
        if let Epilogue::SiluMul(_) = self.epilogue {
            let is_there = index < self.num_couples();
            return is_there.then_some(Couple { first: (0, index), second: Some((1, index)) });
        }
        let mut panel = 2 * index;
        for (number, segment) in self.w.segments.iter().enumerate() {
            let num_panels = segment.num_panels();
            if panel < num_panels {
                let second = (panel + 1 < num_panels).then_some((number, panel + 1));
                return Some(Couple { first: (number, panel), second });
            }
            panel -= num_panels.next_multiple_of(2);
        }
        None
    }

    fn segment(&self, (segment, _): (usize, usize)) -> &Segment {
        &self.w.segments[segment]
    }

    fn packed(&self, (segment, panel): (usize, usize)) -> *const u8 {
        let segment = &self.w.segments[segment];
        segment.data[panel * segment.panel_bytes..][..segment.panel_bytes].as_ptr()
    }

    fn run_couple(&self, index: usize, groups: Range<usize>, workspace: &mut Workspace) {
        let Some(couple) = self.couple(index) else { return };
        let second = couple.second.unwrap_or(couple.first);
        let kernels = [couple.first, second].map(|(segment, _)| &self.kernels[segment]);
        let Workspace { scratch, tiles } = workspace;
        if let ([Some(first), Some(other)], false) =
            (kernels.map(|kernels| kernels.unpacking.as_ref()), self.is_direct())
        {
            let num_blocks = self.w.num_cols / BLOCK;
            let stride = max_unpacked_bytes(CHUNK_BLOCKS);
            let to: *mut u8 = scratch.as_mut_ptr().cast();
            let is_same = couple.second.is_some_and(|second| {
                self.segment(second).format == self.segment(couple.first).format
            });
            for start in (0..num_blocks).step_by(CHUNK_BLOCKS) {
                let blocks = start..num_blocks.min(start + CHUNK_BLOCKS);
                // SAFETY: the kernels are of a detected instruction set and of the segment's
                // format; the scratch has room for a chunk of two panels.
                unsafe {
                    (first.unpack)(self.packed(couple.first), num_blocks, blocks.clone(), to);
                    if let Some(panel) = couple.second {
                        let to = to.add(stride);
                        (other.unpack)(self.packed(panel), num_blocks, blocks.clone(), to);
                    }
                }
                let slice = Slice {
                    weights: [to.cast_const(), to.wrapping_add(stride)],
                    ahead: self.ahead(index, couple, blocks.end),
                    blocks: [blocks.clone(), blocks],
                    by_width: [&first.by_width, &other.by_width],
                    pair: first.pair.filter(|_| is_same),
                };
                self.run_groups(couple, &slice, groups.clone(), tiles);
            }
        } else {
            let slice = Slice {
                weights: [self.packed(couple.first), self.packed(second)],
                blocks: [couple.first, second]
                    .map(|panel| 0..self.segment(panel).num_blocks(self.w.num_cols)),
                by_width: kernels.map(|kernels| &kernels.by_width),
                pair: None,
                ahead: Ahead::default(),
            };
            self.run_groups(couple, &slice, groups, tiles);
        }
    }

    /// The chunk after that which ends before `block`.
    fn ahead(&self, index: usize, couple: Couple, block: usize) -> Ahead {
        let num_blocks = self.w.num_cols / BLOCK;
        let (couple, block) =
            if block < num_blocks { (Some(couple), block) } else { (self.couple(index + 1), 0) };
        let Some(couple) = couple else { return Ahead::default() };
        let segment = self.segment(couple.first);
        let num_next = (num_blocks - block).min(CHUNK_BLOCKS);
        let integers = |panel| {
            let before = self.segment(panel).integer_bytes(block);
            self.packed(panel).wrapping_add(before)
        };
        let scales = |panel| {
            let segment = self.segment(panel);
            let before = segment.integer_bytes(num_blocks) + segment.scale_bytes(block);
            self.packed(panel).wrapping_add(before)
        };
        Ahead {
            integers: [Some(integers(couple.first)), couple.second.map(integers)],
            num_integer_lines: segment.integer_bytes(num_next).div_ceil(CACHE_LINE),
            scales: [Some(scales(couple.first)), couple.second.map(scales)],
            num_scale_lines: segment.scale_bytes(num_next).div_ceil(CACHE_LINE),
        }
    }

    /// Adds what a slice of a couple contributes to the tiles of some groups, and writes the output
    /// after the last one.
    fn run_groups(
        &self,
        couple: Couple,
        slice: &Slice,
        groups: Range<usize>,
        tiles: &mut [[Tile; 2]],
    ) {
        let num_blocks = self.segment(couple.first).num_blocks(self.w.num_cols);
        let is_last = slice.blocks[0].end == num_blocks;
        let fetches_output = is_last && OUTPUT_BYTES < size_of::<f32>() * self.output_len();
        if fetches_output {
            self.prefetch_output(couple, groups.start);
        }
        for (index, tiles) in groups.clone().zip(tiles) {
            slice.ahead.fetch(index - groups.start, groups.len());
            if fetches_output && index + 1 < groups.end {
                self.prefetch_output(couple, index + 1);
            }
            let width = self.groups[index].width;
            let mut args = self.panel_args(couple.first, (slice, 0), index);
            args.sums = tiles.as_mut_ptr();
            args.start = if slice.blocks[0].start == 0 { ZEROS.as_ptr() } else { args.sums };
            let [first, second] = slice.weights;
            if let (MAX_WIDTH, Some(pair)) = (width, slice.pair) {
                // SAFETY: as below, for both panels.
                unsafe { pair(&args, second as usize - first as usize) };
            } else {
                let kernel = width.trailing_zeros() as usize;
                // SAFETY: the kernel is of a detected instruction set, of the segment's format and
                // of the group's width, for which the weights and the activations were made.
                unsafe { slice.by_width[0][kernel](&args) };
                if let Some(panel) = couple.second {
                    let mut other = self.panel_args(panel, (slice, 1), index);
                    other.start = args.start.wrapping_add(1);
                    other.sums = args.sums.wrapping_add(1);
                    // SAFETY: as above; there are two tiles.
                    unsafe { slice.by_width[1][kernel](&other) };
                }
            }
            if is_last {
                self.write(couple, self.groups[index], tiles);
            }
        }
    }

    /// Of the first or the second panel of a slice.
    fn panel_args(
        &self,
        panel: (usize, usize),
        (slice, number): (&Slice, usize),
        group: usize,
    ) -> PanelArgs {
        let activations = &self.activations[group];
        let width = self.groups[group].width;
        let blocks = &slice.blocks[number];
        let first = blocks.start * width;
        let args = PanelArgs {
            panel: slice.weights[number],
            panel_bytes: self.segment(panel).panel_bytes,
            num_blocks: blocks.len(),
            x: std::ptr::null(),
            x_scales: std::ptr::null(),
            x_sums: std::ptr::null(),
            start: ZEROS.as_ptr(),
            sums: std::ptr::null_mut(),
        };
        match self.segment(panel).sum_kind() {
            Some(kind) => PanelArgs {
                x: activations.quants[first * BLOCK..].as_ptr().cast(),
                x_scales: activations.scales[first..].as_ptr(),
                x_sums: activations.sums(kind)[first * kind.halves..].as_ptr(),
                ..args
            },
            None => PanelArgs { x: activations.floats[first..].as_ptr().cast(), ..args },
        }
    }

    /// The output's rows that a panel is for.
    fn rows(&self, panel: (usize, usize)) -> Range<usize> {
        let segment = self.segment(panel);
        let start = match self.epilogue {
            Epilogue::SiluMul(_) => 0,
            _ => segment.first_row,
        };
        start + panel.1 * LANES..start + segment.num_rows.min((panel.1 + 1) * LANES)
    }

    /// Writing to memory that no cache holds waits for it first, so it is asked for beforehand.
    fn prefetch_output(&self, couple: Couple, group: usize) {
        let Group { first, width } = self.groups[group];
        for token in first..first + width {
            for panel in [Some(couple.first), couple.second].into_iter().flatten() {
                let rows = self.rows(panel);
                let row = self.output.get().wrapping_add(token * self.num_rows + rows.start);
                prefetch(row.cast_const().cast());
                prefetch(row.wrapping_add(rows.len() - 1).cast_const().cast());
            }
        }
    }

    fn write(&self, couple: Couple, group: Group, tiles: &[Tile; 2]) {
        let mut gated = ZEROS[0];
        let outputs = if let Epilogue::SiluMul(isa) = self.epilogue {
            let [gate, up] = tiles.each_ref().map(|tile| &tile[..group.width]);
            let out = gated[..group.width].as_flattened_mut();
            isa.run(SiluMul { gate: gate.as_flattened(), up: up.as_flattened(), out });
            [Some((couple.first, &gated)), None]
        } else {
            [Some((couple.first, &tiles[0])), couple.second.map(|panel| (panel, &tiles[1]))]
        };
        for (panel, tile) in outputs.into_iter().flatten() {
            for (t, sums) in tile.iter().enumerate().take(group.width) {
                let out = self.output_rows(panel, group.first + t);
                match self.epilogue {
                    Epilogue::AddBias(bias) => {
                        for ((out, sum), bias) in
                            out.iter_mut().zip(sums).zip(&bias[self.rows(panel)])
                        {
                            out.write(sum + bias);
                        }
                    }
                    _ => {
                        for (out, &sum) in out.iter_mut().zip(sums) {
                            out.write(sum);
                        }
                    }
                }
            }
        }
    }

    /// The place of a panel's rows of a token.
    #[expect(clippy::mut_from_ref, reason = "the tasks write disjoint parts of the output")]
    fn output_rows(&self, panel: (usize, usize), token: usize) -> &mut [MaybeUninit<f32>] {
        let rows = self.rows(panel);
        let at = token * self.num_rows + rows.start;
        // SAFETY: the rows of a panel and the tokens of a group belong to one task, which has one
        // such slice at a time, and lie in the output.
        unsafe { std::slice::from_raw_parts_mut(self.output.get().add(at).cast(), rows.len()) }
    }
}
