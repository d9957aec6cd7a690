//! `confirm`: keeps a change that was made with `--confirm-within`, or undoes it.

use hyper::Method;
use serde_json::Value;

use crate::cli::{Common, ConfirmArgs};
use crate::client::{API, call, encode};
use crate::failure::Failure;
use crate::output::{self, Style, paint, text};

pub(crate) async fn run(common: &Common, args: &ConfirmArgs) -> Result<(), Failure> {
    let path = format!("{API}/confirmations");
    let list = async || call(common.controller(), Method::GET, &path, None).await;
    if args.list {
        let answer = list().await?;
        return output::show(common.output, &answer, || Ok(table(&answer)));
    }
    let id = match &args.id {
        Some(id) => id.clone(),
        None => only(&list().await?)?,
    };
    let verb = if args.rollback { "rollback" } else { "confirm" };
    let answer =
        call(common.controller(), Method::POST, &format!("{path}/{}/{verb}", encode(&id)), None).await?;
    output::show(common.output, &answer, || {
        let objects = names(&answer["objects"]);
        if !args.rollback {
            return Ok(format!("{id} is kept: {objects}\n"));
        }
        Ok(format!("{id} is rolled back: {objects}\n{}", left_alone(&answer)))
    })
}

/// The only one that waits.
fn only(list: &Value) -> Result<String, Failure> {
    let waiting: Vec<String> =
        items(list).filter(|item| item["standing"] == "waiting").map(|item| text(item, "/id")).collect();
    match &waiting[..] {
        [id] => Ok(id.clone()),
        [] => Err(Failure::no("no change waits for confirmation")),
        several => Err(Failure::Usage(format!("several changes wait, name one: {}", several.join(", ")))),
    }
}

fn items(list: &Value) -> impl Iterator<Item = &Value> {
    list["items"].as_array().into_iter().flatten()
}

fn names(value: &Value) -> String {
    let names: Vec<_> = value.as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    names.join(", ")
}

fn left_alone(item: &Value) -> String {
    let left = item["leftAlone"].as_array().into_iter().flatten();
    let line = |one: &Value| {
        format!(
            "  {} {}: {}\n",
            paint(Style::Bad, "left as it is:"),
            text(one, "/object"),
            text(one, "/reason")
        )
    };
    left.map(line).collect()
}

fn table(list: &Value) -> String {
    let line = |item: &Value| {
        let when = if item["standing"] == "waiting" {
            format!("waits, rolled back at {}", text(item, "/deadline"))
        } else {
            format!("rolled back at {}", text(item, "/rolledBackAt"))
        };
        let head =
            format!("{}  {when}  by {}  {}\n", text(item, "/id"), text(item, "/by"), names(&item["objects"]));
        head + &left_alone(item)
    };
    let lines: String = items(list).map(line).collect();
    if lines.is_empty() { "nothing waits for confirmation\n".into() } else { lines }
}
