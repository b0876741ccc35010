// Reads the google.rpc details that ChunkServe sends with every error.
import grpc from "@grpc/grpc-js";
import protobuf from "protobufjs";

const DETAILS_KEY = "grpc-status-details-bin";

const SCHEMA = `
  syntax = "proto3";
  package google.rpc;
  message Any { string type_url = 1; bytes value = 2; }
  message Status { int32 code = 1; string message = 2; repeated Any details = 3; }
  message ErrorInfo { string reason = 1; string domain = 2; map<string, string> metadata = 3; }
`;
const { root } = protobuf.parse(SCHEMA, { keepCase: true });
const Status = root.lookupType("google.rpc.Status");
const ErrorInfo = root.lookupType("google.rpc.ErrorInfo");

/** Returns `{reason, domain, metadata}` of an error of gRPC, or undefined if it has none. */
export function errorInfo(error) {
  const [bytes] = error.metadata?.get(DETAILS_KEY) ?? [];
  if (!Buffer.isBuffer(bytes)) return undefined;
  try {
    const detail = Status.decode(bytes).details.find(({ type_url: url }) =>
      url.endsWith("/google.rpc.ErrorInfo"),
    );
    return detail && ErrorInfo.toObject(ErrorInfo.decode(detail.value), { defaults: true });
  } catch {
    return undefined; // damaged details count as absent
  }
}

/** Returns one line: the message, the status and the reason. */
export function describeError(error) {
  if (error.code === undefined || grpc.status[error.code] === undefined) return error.message;
  const reason = errorInfo(error)?.reason;
  const status = grpc.status[error.code];
  return `${error.details} [${reason ? `${status}, ${reason}` : status}]`.replaceAll(/\s+/g, " ");
}
