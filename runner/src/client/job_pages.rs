//! A list of jobs over as many pages as it takes.

use nestling_api::types::JobList;

use super::{Client, ClientError};

/// The pages of a list of jobs, each asked for when it is wanted. A node may end a page before it is full, so what tells of
/// another one is the answer's `Link` (RFC 8288) and not its length. Ends after an error.
#[derive(Debug)]
pub struct JobPages<'a> {
    client: &'a Client,
    next: Option<String>,
}

impl<'a> JobPages<'a> {
    pub(super) fn new(client: &'a Client, first: String) -> JobPages<'a> {
        JobPages { client, next: Some(first) }
    }
}

impl Iterator for JobPages<'_> {
    type Item = Result<JobList, ClientError>;

    fn next(&mut self) -> Option<Result<JobList, ClientError>> {
        let path = self.next.take()?;
        let page = self.client.request("GET", &path, &[], None).and_then(|answer| {
            let next = answer.header("link").and_then(next_page).map(str::to_owned);
            Ok((self.client.decode::<JobList>(&path, answer)?, next))
        });
        Some(page.map(|(list, next)| {
            // A node that gave empty pages for ever would be asked for ever.
            self.next = next.filter(|_| !list.jobs.is_empty());
            list
        }))
    }
}

/// The path of the next page in a `Link` field such as `</v1/jobs?page=1>; rel="prev", </v1/jobs?page=3>; rel="next"`.
fn next_page(link: &str) -> Option<&str> {
    link.split(',').find_map(|link| {
        let (path, parameters) = link.trim().strip_prefix('<')?.split_once('>')?;
        let next =
            parameters.split(';').any(|parameter| matches!(parameter.trim(), "rel=\"next\"" | "rel=next"));
        (next && path.starts_with('/')).then_some(path)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_next_page_is_the_one_the_link_says() {
        for (link, expected) in [
            ("</v1/jobs?page=2&per_page=3>; rel=\"next\"", Some("/v1/jobs?page=2&per_page=3")),
            ("</v1/jobs?page=1>; rel=\"prev\", </v1/jobs?page=3>; rel=\"next\"", Some("/v1/jobs?page=3")),
            ("</v1/jobs?page=1>; rel=\"prev\"", None),
            ("<http://elsewhere/>; rel=\"next\"", None),
            ("", None),
            ("</v1/jobs", None),
        ] {
            assert_eq!(next_page(link), expected, "{link}");
        }
    }
}
