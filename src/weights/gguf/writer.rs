//! Writes GGUF files: tiny ones for tests, with every number open to tampering, and headers of
//! large ones whose tensors are holes.

use candle_core::quantized::GgmlDType;

use super::header::code_of;

/// A GGUF file under construction.
#[derive(Clone, Debug, Default)]
pub(crate) struct Writer {
    entries: Vec<(String, Vec<u8>)>,
    tensors: Vec<Tensor>,
}

/// A tensor to be written.
#[derive(Clone, Debug)]
struct Tensor {
    name: String,
    /// Innermost dimension first, as the format has it.
    dimensions: Vec<u64>,
    code: u32,
    offset: Option<u64>,
    #[cfg(test)]
    bytes: Vec<u8>,
    num_bytes: u64,
}

/// Each tensor begins at a multiple of so many bytes.
pub(crate) const ALIGNMENT: u64 = 32;

impl Writer {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// Adds a value given as its type's number and its bytes.
    pub(crate) fn raw(mut self, key: &str, code: u32, bytes: &[u8]) -> Self {
        self.entries.push((key.to_owned(), [&code.to_le_bytes(), bytes].concat()));
        self
    }

    pub(crate) fn u32(self, key: &str, value: u32) -> Self {
        self.raw(key, 4, &value.to_le_bytes())
    }

    pub(crate) fn f32(self, key: &str, value: f32) -> Self {
        self.raw(key, 6, &value.to_le_bytes())
    }

    pub(crate) fn string(self, key: &str, value: &str) -> Self {
        self.raw(key, 8, &text(value))
    }

    pub(crate) fn strings(self, key: &str, values: &[&str]) -> Self {
        let mut bytes = array_start(8, values.len());
        for value in values {
            bytes.extend(text(value));
        }
        self.raw(key, 9, &bytes)
    }

    pub(crate) fn i32s(self, key: &str, values: &[i32]) -> Self {
        let mut bytes = array_start(5, values.len());
        for value in values {
            bytes.extend(value.to_le_bytes());
        }
        self.raw(key, 9, &bytes)
    }

    pub(crate) fn bools(self, key: &str, values: &[bool]) -> Self {
        let mut bytes = array_start(7, values.len());
        bytes.extend(values.iter().map(|&value| u8::from(value)));
        self.raw(key, 9, &bytes)
    }

    pub(crate) fn bool(self, key: &str, value: bool) -> Self {
        self.raw(key, 7, &[u8::from(value)])
    }

    /// Adds a tensor whose bytes are left out; dimensions innermost first.
    pub(crate) fn hole(
        mut self,
        name: &str,
        dimensions: &[u64],
        dtype: GgmlDType,
        num_bytes: u64,
    ) -> Self {
        self.tensors.push(Tensor {
            name: name.to_owned(),
            dimensions: dimensions.to_vec(),
            code: code_of(dtype),
            offset: None,
            #[cfg(test)]
            bytes: Vec::new(),
            num_bytes,
        });
        self
    }

    /// Adds a tensor with its own bytes; dimensions innermost first.
    #[cfg(test)]
    pub(crate) fn tensor(self, name: &str, dimensions: &[u64], code: u32, bytes: &[u8]) -> Self {
        self.tensor_at(name, dimensions, code, (None, bytes))
    }

    /// The same with a chosen offset, which moves the description and not the bytes.
    #[cfg(test)]
    pub(crate) fn tensor_at(
        mut self,
        name: &str,
        dimensions: &[u64],
        code: u32,
        (offset, bytes): (Option<u64>, &[u8]),
    ) -> Self {
        self.tensors.push(Tensor {
            name: name.to_owned(),
            dimensions: dimensions.to_vec(),
            code,
            offset,
            bytes: bytes.to_vec(),
            num_bytes: bytes.len() as u64,
        });
        self
    }

    /// The file's bytes, version 3.
    #[cfg(test)]
    pub(crate) fn build(&self) -> Vec<u8> {
        let (mut file, _) = self.header();
        for tensor in &self.tensors {
            file.extend(&tensor.bytes);
            file.resize(file.len().next_multiple_of(ALIGNMENT as usize), 0);
        }
        file
    }

    /// What stands before the tensors' bytes, and the length of the whole file.
    pub(crate) fn header(&self) -> (Vec<u8>, u64) {
        let mut file = b"GGUF".to_vec();
        file.extend(3_u32.to_le_bytes());
        file.extend((self.tensors.len() as u64).to_le_bytes());
        file.extend((self.entries.len() as u64).to_le_bytes());
        for (key, value) in &self.entries {
            file.extend(text(key));
            file.extend(value);
        }
        let mut data_len = 0;
        for tensor in &self.tensors {
            file.extend(text(&tensor.name));
            file.extend((tensor.dimensions.len() as u32).to_le_bytes());
            for size in &tensor.dimensions {
                file.extend(size.to_le_bytes());
            }
            file.extend(tensor.code.to_le_bytes());
            file.extend(tensor.offset.unwrap_or(data_len).to_le_bytes());
            data_len = (data_len + tensor.num_bytes).next_multiple_of(ALIGNMENT);
        }
        file.resize(file.len().next_multiple_of(ALIGNMENT as usize), 0);
        let len = file.len() as u64 + data_len;
        (file, len)
    }
}

fn text(value: &str) -> Vec<u8> {
    [&(value.len() as u64).to_le_bytes(), value.as_bytes()].concat()
}

fn array_start(element: u32, len: usize) -> Vec<u8> {
    [&element.to_le_bytes()[..], &(len as u64).to_le_bytes()].concat()
}
