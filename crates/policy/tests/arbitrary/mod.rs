//! Firewall files as users could write them, and requests as clients could send them: few names and paths, in many
//! spellings, so that rules and requests meet.

use proptest::prelude::*;
use proptest::sample::select;

const HOSTS: [&str; 7] = [
    "a.example",
    "b.a.example",
    "*.a.example",
    "*.example",
    "*",
    "198.18.0.1",
    "xn--mnchen-3ya.example",
];

fn one_of(texts: &[&str]) -> impl Strategy<Value = String> + Clone + use<> {
    select(
        texts
            .iter()
            .map(|text| (*text).to_owned())
            .collect::<Vec<_>>(),
    )
}

fn requests() -> impl Strategy<Value = String> {
    let path = one_of(&["/", "/x", "/{a}", "/x/{b+}", "/{c*}", "/%78/y"]);
    let request = ("(GET|post|ANY|DELETE)", path);
    let request = request.prop_map(|(method, path)| format!("\"{method} {path}\""));
    proptest::collection::vec(request, 0..3).prop_map(|all| all.join(", "))
}

fn action() -> impl Strategy<Value = String> {
    let fields = one_of(&[
        "",
        ", headers: {Authorization: \"Bearer ${{ secrets.TOKEN }}\"}",
        ", query: {key: v}",
    ]);
    prop_oneof![
        1 => Just(", action: deny".to_owned()),
        2 => (requests(), requests(), fields)
            .prop_map(|(allow, deny, fields)| format!(", allow: [{allow}], deny: [{deny}]{fields}")),
    ]
}

fn rule() -> impl Strategy<Value = String> {
    let name = one_of(&["", "name: first, ", "name: second, "]);
    let host = one_of(&HOSTS).prop_map(|host| format!("host: \"{host}\""));
    let path = one_of(&["", ", path: /x", ", path: /x/y", ", path: \"/%78\""]);
    let scheme = one_of(&["", ", scheme: https", ", port: 443", ", port: 80"]);
    prop_oneof![
        4 => (name.clone(), host.clone(), path, scheme, action())
            .prop_map(|(name, host, path, scheme, action)| [name, host, path, scheme, action].concat()),
        1 => (host.clone(), "(22|5432)", "(allow|deny)")
            .prop_map(|(host, port, action)| format!("{host}, port: {port}, action: {action}")),
        1 => (host, "(, port: 443|)")
            .prop_map(|(host, port)| format!("{host}, action: passthrough{port}")),
        1 => (name, "https?://[ab]\\.example(/x)?(/y)?")
            .prop_map(|(name, base)| format!("{name}base: \"{base}\"")),
    ]
    .prop_map(|rule| format!("{{{rule}}}"))
}

/// A firewall file.
pub(crate) fn file() -> impl Strategy<Value = String> {
    let default = one_of(&["", "default: allow\n", "default: deny\n"]);
    let mode = one_of(&["", "mode: audit\n"]);
    (default, mode, proptest::collection::vec(rule(), 0..6))
        .prop_map(|(default, mode, rules)| format!("{default}{mode}rules: [{}]", rules.join(", ")))
}

/// A `Host` header.
pub(crate) fn host() -> impl Strategy<Value = String> {
    prop_oneof![
        4 => one_of(&["a.example", "A.Example.", "b.a.example", "c.b.a.example", "example", "198.18.0.1", "a.example:443", "b.example"]),
        1 => "[a-z.:0-9]{0,20}",
        1 => "\\PC{0,20}",
    ]
}

/// A request's method.
pub(crate) fn method() -> impl Strategy<Value = String> {
    prop_oneof![4 => one_of(&["GET", "get", "POST", "DELETE", "OPTIONS"]), 1 => "\\PC{0,8}"]
}

/// A request's path and query.
pub(crate) fn path() -> impl Strategy<Value = String> {
    let piece = one_of(&[
        "x", "y", "%78", "%2e%2e", "..", ".", "", "%2f", "%25", "a b", "{x}", "ä", "..;", "%",
        "%5C", "%C0", "@", "%40",
    ]);
    prop_oneof![
        4 => proptest::collection::vec(piece, 0..6).prop_map(|pieces| format!("/{}", pieces.join("/"))),
        1 => "[/.%a-z0-9?#]{0,20}",
        1 => "\\PC{0,20}",
    ]
}
