//! Where the bundle of images and the user's store of images are found.

use std::env;
use std::fmt;
use std::path::{Path, PathBuf};

/// The bundle's file name.
const FILE: &str = "minimal.tar";

/// The store's file name, in the user's data.
const STORE: &str = "images.tar";

/// The user's store of images: `$XDG_DATA_HOME/nestling/images.tar`. It need not be there. None when the user has no home.
#[must_use]
pub fn default_store() -> Option<PathBuf> {
    data().map(|data| data.join("nestling").join(STORE))
}

/// The store a node's machines can boot from beside the bundle: `given`, or [`default_store`] where it is there.
///
/// # Errors
/// [`NotFound`] when `given` is not there.
pub fn find_store(given: Option<&Path>) -> Result<Option<PathBuf>, NotFound> {
    match given {
        Some(path) => match path.canonicalize() {
            Ok(path) if !path.is_dir() => Ok(Some(path)),
            _ => Err(NotFound::Store(path.to_owned())),
        },
        None => Ok(default_store().filter(|path| path.is_file())),
    }
}

/// Where the user's data are.
fn data() -> Option<PathBuf> {
    env::var_os("XDG_DATA_HOME")
        .map(PathBuf::from)
        .filter(|path| path.is_absolute())
        .or_else(|| Some(env::home_dir()?.join(".local/share")))
}

/// Finds the bundle a node is started with: `given`, `NESTLING_IMAGE`, `target/images/minimal.tar` of the checkout the
/// current directory or this executable is in, `$XDG_DATA_HOME/nestling/images/minimal.tar`; in this order.
///
/// # Errors
/// [`NotFound`] with the places searched.
pub fn find(given: Option<&Path>) -> Result<PathBuf, NotFound> {
    if let Some(path) = given {
        return named("--image", path);
    }
    if let Some(path) = env::var_os("NESTLING_IMAGE").filter(|path| !path.is_empty()) {
        return named("NESTLING_IMAGE", Path::new(&path));
    }
    search(&candidates())
}

/// A path somebody named, made absolute: QEMU may run elsewhere.
fn named(by: &'static str, path: &Path) -> Result<PathBuf, NotFound> {
    match path.canonicalize() {
        Ok(path) if path.is_file() => Ok(path),
        _ => Err(NotFound::Named { by, path: path.to_owned() }),
    }
}

fn search(places: &[PathBuf]) -> Result<PathBuf, NotFound> {
    match places.iter().find(|path| path.is_file()) {
        Some(path) => Ok(path.clone()),
        None => Err(NotFound::Searched(places.to_vec())),
    }
}

/// The places searched when nobody named one.
fn candidates() -> Vec<PathBuf> {
    let mut places = Vec::new();
    let starts = [env::current_dir().ok(), env::current_exe().ok()];
    for start in starts.into_iter().flatten() {
        if let Some(checkout) = checkout(&start) {
            let place = checkout.join("target/images").join(FILE);
            if !places.contains(&place) {
                places.push(place);
            }
        }
    }
    places.extend(data().map(|data| data.join("nestling/images").join(FILE)));
    places
}

/// The checkout of nestling's repository `start` is in, known by the recipe of the image.
fn checkout(start: &Path) -> Option<&Path> {
    start.ancestors().find(|dir| dir.join("images/guest").is_dir() && dir.join("kernel/machine").is_dir())
}

/// No bundle of images.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NotFound {
    /// Somebody named a file that is not there.
    Named {
        /// The option or variable that named it.
        by: &'static str,
        /// What it named.
        path: PathBuf,
    },
    /// None of the usual places has one.
    Searched(Vec<PathBuf>),
    /// Somebody named a store that is not there.
    Store(PathBuf),
}

impl fmt::Display for NotFound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NotFound::Named { by, path } => write!(f, "{by}: {} is not a file", path.display())?,
            NotFound::Store(path) => {
                let path = path.display();
                return write!(
                    f,
                    "--store: {path} is not there; `nestling image add BUNDLE --to {path}` makes it"
                );
            }
            NotFound::Searched(places) => {
                f.write_str("there is no image for the jobs' machines; looked for")?;
                for place in places {
                    write!(f, "\n  {}", place.display())?;
                }
            }
        }
        f.write_str("\nbuild one in a checkout of nestling with `cargo xtask image minimal`, or name one with --image FILE")
    }
}

impl std::error::Error for NotFound {}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_named_file_that_is_missing_is_named_with_who_named_it() {
        let error = find(Some(Path::new("/nonexistent/x.tar"))).unwrap_err();
        assert!(error.to_string().starts_with("--image: /nonexistent/x.tar is not a file"), "{error}");
        assert!(error.to_string().contains("cargo xtask image minimal"));
    }

    #[test]
    fn a_store_that_is_named_has_to_be_there() {
        let error = find_store(Some(Path::new("/nonexistent/images.tar"))).unwrap_err().to_string();
        assert!(error.contains("/nonexistent/images.tar") && error.contains("nestling image add"), "{error}");
        let file = tempfile::NamedTempFile::new().unwrap();
        assert_eq!(find_store(Some(file.path())).unwrap().as_deref(), Some(file.path()));
    }

    #[test]
    fn the_first_place_that_has_one_is_taken() {
        let dir = tempfile::tempdir().unwrap();
        let (first, second) = (dir.path().join("a.tar"), dir.path().join("b.tar"));
        let places = [first.clone(), second.clone()];
        assert_eq!(search(&places), Err(NotFound::Searched(places.to_vec())));
        fs::write(&second, "").unwrap();
        assert_eq!(search(&places), Ok(second));
        fs::write(&first, "").unwrap();
        assert_eq!(search(&places), Ok(first));
    }

    #[test]
    fn a_checkout_is_found_from_any_directory_inside_it() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("images/guest/agent")).unwrap();
        fs::create_dir_all(dir.path().join("kernel/machine")).unwrap();
        assert_eq!(checkout(&dir.path().join("images/guest/agent")), Some(dir.path()));
        assert_eq!(checkout(Path::new("/")), None);
    }
}
