//! Writes tiny GGUF files for tests, with every number open to tampering.

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
    bytes: Vec<u8>,
}

const ALIGNMENT: usize = 32;

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

    /// Adds a tensor with its own bytes; dimensions innermost first.
    pub(crate) fn tensor(self, name: &str, dimensions: &[u64], code: u32, bytes: &[u8]) -> Self {
        self.tensor_at(name, dimensions, code, (None, bytes))
    }

    /// The same with a chosen offset, which moves the description and not the bytes.
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
        });
        self
    }

    /// The file's bytes, version 3.
    pub(crate) fn build(&self) -> Vec<u8> {
        let mut file = b"GGUF".to_vec();
        file.extend(3_u32.to_le_bytes());
        file.extend((self.tensors.len() as u64).to_le_bytes());
        file.extend((self.entries.len() as u64).to_le_bytes());
        for (key, value) in &self.entries {
            file.extend(text(key));
            file.extend(value);
        }
        let mut data: Vec<u8> = Vec::new();
        for tensor in &self.tensors {
            file.extend(text(&tensor.name));
            file.extend((tensor.dimensions.len() as u32).to_le_bytes());
            for size in &tensor.dimensions {
                file.extend(size.to_le_bytes());
            }
            file.extend(tensor.code.to_le_bytes());
            file.extend(tensor.offset.unwrap_or(data.len() as u64).to_le_bytes());
            data.extend(&tensor.bytes);
            data.resize(data.len().next_multiple_of(ALIGNMENT), 0);
        }
        file.resize(file.len().next_multiple_of(ALIGNMENT), 0);
        file.extend(data);
        file
    }
}

fn text(value: &str) -> Vec<u8> {
    [&(value.len() as u64).to_le_bytes(), value.as_bytes()].concat()
}

fn array_start(element: u32, len: usize) -> Vec<u8> {
    [&element.to_le_bytes()[..], &(len as u64).to_le_bytes()].concat()
}
