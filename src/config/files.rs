//! Reads the files that variables name: keys, secrets, registrations. Bounded in time and size, since a path may lead to
//! anything.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Read as _};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::Path;
use std::sync::mpsc;
use std::time::Duration;

/// Time for reading a file: the writer of a pipe (`<(pass show livekit)`) may have to ask somebody first, and a file system may
/// hang.
const READ_TIMEOUT: Duration = Duration::from_secs(5);
/// No file of keys and no registration is larger.
const MAX_BYTES: u64 = 256 * 1024;

/// The text of a file or a pipe.
pub(crate) fn read(path: &str) -> io::Result<String> {
    let (send, receive) = mpsc::channel();
    let path = path.to_owned();
    // Opening a pipe waits for its writer, and nothing but a thread of its own can be left waiting.
    std::thread::Builder::new().spawn(move || {
        // Nobody listens any more after the time-out.
        let _ = send.send(read_now(Path::new(&path)));
    })?;
    receive.recv_timeout(READ_TIMEOUT).unwrap_or_else(|_| {
        let text = format!("nothing wrote it to its end within {} s", READ_TIMEOUT.as_secs());
        Err(io::Error::new(ErrorKind::TimedOut, text))
    })
}

fn read_now(path: &Path) -> io::Result<String> {
    let unusable = |what: &str| Err(io::Error::new(ErrorKind::InvalidInput, what));
    let kind = fs::metadata(path).map_err(|error| who_may(error, path))?.file_type();
    if kind.is_dir() {
        return unusable("it is a directory");
    }
    if !kind.is_file() && !kind.is_fifo() {
        return unusable("it is a device or a socket, not a file");
    }
    let mut text = Vec::new();
    let file = File::open(path).map_err(|error| who_may(error, path))?;
    file.take(MAX_BYTES + 1).read_to_end(&mut text)?;
    if u64::try_from(text.len()).is_ok_and(|length| length > MAX_BYTES) {
        return unusable("it is longer than any such file");
    }
    String::from_utf8(text).or_else(|_| unusable("it is not text in UTF-8"))
}

/// Names the user who was refused, and the owner of the file where that is to be seen.
fn who_may(error: io::Error, path: &Path) -> io::Error {
    if error.kind() != ErrorKind::PermissionDenied {
        return error;
    }
    let us = rustix::process::geteuid().as_raw();
    let text = match fs::metadata(path) {
        Ok(file) => format!(
            "{error}: this service runs as uid {us}, the file belongs to uid {} with mode {:04o}",
            file.uid(),
            file.mode() & 0o7777
        ),
        Err(_) => format!("{error}: this service runs as uid {us}, which may not enter a directory above the file"),
    };
    io::Error::new(error.kind(), text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_files_only() {
        let directory = std::env::temp_dir().join(format!("lk-jwt-files-{}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        let path = |name: &str| directory.join(name).to_string_lossy().into_owned();
        let largest = usize::try_from(MAX_BYTES).unwrap();
        fs::write(path("good"), " text\r\n").unwrap();
        fs::write(path("largest"), vec![b'x'; largest]).unwrap();
        fs::write(path("larger"), vec![b'x'; largest + 1]).unwrap();
        fs::write(path("binary"), [0xff, 0xfe, 0x00]).unwrap();
        std::os::unix::fs::symlink("/dev/zero", path("link")).unwrap();
        assert_eq!(read(&path("good")).unwrap(), " text\r\n");
        assert_eq!(read(&path("largest")).unwrap().len(), largest);
        for (name, problem) in [
            (path("larger"), "longer"),
            (path("binary"), "UTF-8"),
            (path("."), "a directory"),
            (path("link"), "a device"),
            ("/dev/null".to_owned(), "a device"),
            (path("none"), "No such file"),
        ] {
            let error = read(&name).unwrap_err().to_string();
            assert!(error.contains(problem), "{name}: {error}");
        }
        fs::remove_dir_all(&directory).unwrap();
    }
}
