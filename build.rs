//! Compiles `kernels/**/*.cu`: with nvcc for cards (feature `cuda`), with g++ for the emulation
//! (feature `emulation`). Without these features there is nothing to do.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::time::SystemTime;

/// Cards that get machine code of their own; later ones compile the PTX of the first.
const ARCHITECTURES: [&str; 2] = ["80", "90a"];

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=kernels");
    for variable in ["NVCC", "CUDA_HOME", "CXX"] {
        println!("cargo:rerun-if-env-changed={variable}");
    }
    let out = PathBuf::from(env::var("OUT_DIR").expect("cargo sets OUT_DIR"));
    let sources = Sources::find(Path::new("kernels"));
    if env::var_os("CARGO_FEATURE_CUDA").is_some() {
        compile_for_cards(&sources, &out);
    }
    if env::var_os("CARGO_FEATURE_EMULATION").is_some() {
        compile_for_the_host(&sources, &out);
    }
}

/// The kernels, and when anything they include was last changed.
struct Sources {
    kernels: Vec<PathBuf>,
    emulation: Vec<PathBuf>,
    headers_changed: SystemTime,
}

impl Sources {
    fn find(root: &Path) -> Self {
        let mut all = Vec::new();
        collect(root, &mut all);
        all.sort();
        let is = |path: &Path, extension| path.extension().is_some_and(|found| found == extension);
        // The options are here.
        let this = PathBuf::from("build.rs");
        let headers = all.iter().filter(|path| is(path, "cuh") || is(path, "h")).chain([&this]);
        Self {
            headers_changed: headers
                .map(|path| changed(path))
                .max()
                .unwrap_or(SystemTime::UNIX_EPOCH),
            kernels: all.iter().filter(|path| is(path, "cu")).cloned().collect(),
            emulation: all.iter().filter(|path| is(path, "cpp")).cloned().collect(),
        }
    }

    /// Runs `command(source, output)` for every source whose output is older, two at a time.
    fn compile(
        &self,
        sources: &[PathBuf],
        (out, extension): (&Path, &str),
        command: impl Fn(&Path, &Path) -> Command + Sync,
    ) -> Vec<PathBuf> {
        let outputs: Vec<PathBuf> =
            sources.iter().map(|path| out.join(stem(path)).with_extension(extension)).collect();
        let jobs: Vec<_> = sources
            .iter()
            .zip(&outputs)
            .filter(|(source, output)| {
                !output.exists() || changed(output) < changed(source).max(self.headers_changed)
            })
            .collect();
        let next = Mutex::new(jobs.into_iter());
        let num_jobs = std::thread::available_parallelism().map_or(2, usize::from);
        std::thread::scope(|scope| {
            for _ in 0..num_jobs {
                scope.spawn(|| {
                    loop {
                        let Some((source, output)) = next.lock().expect("no panic").next() else {
                            break;
                        };
                        run(&mut command(source, output), &source.display().to_string());
                    }
                });
            }
        });
        outputs
    }
}

/// One fatbin a kernel file and `fatbins.rs`, a table of their names and contents.
fn compile_for_cards(sources: &Sources, out: &Path) {
    let nvcc = find_nvcc();
    let fatbins = sources.compile(&sources.kernels, (out, "fatbin"), |source, output| {
        let mut command = Command::new(&nvcc);
        command.args(["-fatbin", "-O3", "-std=c++17", "--expt-relaxed-constexpr"]);
        command.args(["-Xfatbin", "-compress-all", "-I", "kernels/include"]);
        for architecture in ARCHITECTURES {
            command.arg(format!("-gencode=arch=compute_{architecture},code=sm_{architecture}"));
        }
        let first = ARCHITECTURES[0];
        command.arg(format!("-gencode=arch=compute_{first},code=compute_{first}"));
        command.arg("-o").arg(output).arg(source);
        command
    });
    let lines: Vec<String> = fatbins
        .iter()
        .map(|path| format!("    ({:?}, include_bytes!({:?})),\n", stem(path), path.display()))
        .collect();
    let table = format!("&[\n{}]\n", lines.concat());
    fs::write(out.join("fatbins.rs"), table).expect("the build folder is writable");
}

/// One shared library of all kernels.
fn compile_for_the_host(sources: &Sources, out: &Path) {
    let compiler = env::var("CXX").unwrap_or_else(|_| "g++".to_owned());
    // Checkouts that share a target folder have this one in common, and other kernels each.
    let checkout = env::var("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR");
    let out = &out.join(checkout.replace(['/', '\\', ':'], "-"));
    fs::create_dir_all(out).expect("the build folder is writable");
    let compile = |source: &Path, output: &Path| {
        let mut command = Command::new(&compiler);
        command.args(["-std=c++17", "-O2", "-fPIC", "-x", "c++", "-I", "kernels/include"]);
        // Shared memory is read as other types than it was written, and products are rounded.
        command.args(["-fno-strict-aliasing", "-ffp-contract=off", "-fvisibility=hidden"]);
        // Functions of one name in several kernel files stay apart, as they do on a card.
        command.args(["-fno-weak", "-w"]);
        // What is an error on a card, or undefined there, stops the kernel here.
        command.arg("-fsanitize=alignment,bounds,shift-exponent,integer-divide-by-zero");
        command.arg("-fsanitize-undefined-trap-on-error");
        command.arg("-c").arg(source).arg("-o").arg(output);
        command
    };
    let mut objects = sources.compile(&sources.kernels, (out, "o"), compile);
    objects.extend(sources.compile(&sources.emulation, (out, "o"), compile));
    let library = out.join("libemulated_kernels.so");
    let mut link = Command::new(&compiler);
    link.arg("-shared").arg("-o").arg(&library).args(&objects).arg("-lpthread");
    run(&mut link, "the emulated kernels");
    println!("cargo:rustc-env=EMULATED_KERNELS={}", library.display());
}

fn find_nvcc() -> PathBuf {
    let from_home = env::var_os("CUDA_HOME").map(|home| Path::new(&home).join("bin/nvcc"));
    let places = [
        env::var_os("NVCC").map(PathBuf::from),
        from_home,
        Some(PathBuf::from("/usr/local/cuda/bin/nvcc")),
    ];
    let found = places.into_iter().flatten().find(|path| path.exists());
    found.unwrap_or_else(|| PathBuf::from("nvcc"))
}

fn run(command: &mut Command, what: &str) {
    let output = command.output().unwrap_or_else(|error| {
        panic!(
            "cannot start `{}` for {what}: {error}; run `scripts/cuda-home.sh` and set CUDA_HOME to \
             what it prints, or install CUDA 13 (kernels) or g++ (emulation)",
            command.get_program().display()
        )
    });
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{what} does not compile:\n{text}");
}

fn collect(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).expect("the kernels are part of the source").flatten() {
        let path = entry.path();
        if path.is_dir() {
            collect(&path, found);
        } else {
            found.push(path);
        }
    }
}

fn changed(path: &Path) -> SystemTime {
    path.metadata().and_then(|metadata| metadata.modified()).unwrap_or(SystemTime::now())
}

fn stem(path: &Path) -> String {
    path.file_stem().expect("a file has a name").to_string_lossy().into_owned()
}
