//! What all of the runner's HTTP clients have in common: what they say of themselves, and of what went wrong.

/// A client to be built: it says who we are, and follows no redirection, which would carry a token to wherever it points.
pub(crate) fn client() -> reqwest::ClientBuilder {
    reqwest::Client::builder()
        .user_agent(format!("vm0-runner/{}", crate::cli::VERSION))
        .redirect(reqwest::redirect::Policy::none())
}

/// An HTTP error with what is below it, which says more than its own words, and without the URL, which is told anyway.
pub(crate) fn causes(error: &reqwest::Error) -> String {
    let mut text = match error {
        // Addresses are parsed before, so that only making the client is left to fail.
        error if error.is_builder() => {
            "no HTTP client can be made (does this host have ca-certificates?)".to_owned()
        }
        error if error.is_connect() => "no connection".to_owned(),
        error if error.is_redirect() => "the redirection cannot be followed".to_owned(),
        error if error.is_timeout() => "the time ran out".to_owned(),
        error if error.is_body() || error.is_decode() => "the connection was cut".to_owned(),
        _ => "the request failed".to_owned(),
    };
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        let words = cause.to_string();
        if !text.contains(&words) {
            text.push_str(": ");
            text.push_str(&words);
        }
        source = cause.source();
    }
    text
}
