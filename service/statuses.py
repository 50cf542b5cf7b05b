"""Maps errors to HTTP statuses."""

from collections.abc import Mapping

from rednet.service import errors

STATUS: Mapping[type[errors.ServiceError], int] = {
    errors.MalformedRequest: 400,
    errors.Unauthorized: 401,
    errors.NotFound: 404,
    errors.MethodNotAllowed: 405,
    errors.NotAcceptable: 406,
    errors.RequestTimeout: 408,
    errors.PayloadTooLarge: 413,
    errors.UriTooLong: 414,
    errors.UnsupportedMediaType: 415,
    errors.UnreadableImage: 422,
    errors.NumericalOverflow: 422,
    errors.Overloaded: 429,
    errors.HeadersTooLarge: 431,
    errors.Cancelled: 499,
    errors.Internal: 500,
    errors.NotReady: 503,
    errors.DecoderUnavailable: 503,
    errors.DeviceFailed: 503,
    errors.Draining: 503,
    errors.DeadlineExceeded: 504,
}
