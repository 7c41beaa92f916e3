// This file holds the settings of header_up, header_down and default_origin.

package handshake

import (
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strings"

	"go.uber.org/zap"
	"golang.org/x/net/http/httpguts"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/headers"
)

// Headers changes headers on their way through the proxy. A nil one changes none.
type Headers struct {
	// Changes to what a backend gets. Placeholders have the values of the moment
	// when the client arrived, for later backends too; but those of the upstream,
	// `http.reverse_proxy.upstream.address`, `.hostport`, `.host` and `.port`, are
	// of the backend that is dialed. The headers of the handshake itself (Upgrade,
	// Connection, Sec-WebSocket-Key, -Version and -Extensions), those of framing,
	// and Holdfast-* are set afterwards. A Host that is removed is the upstream's.
	// Default: none, and Host is kept.
	Request *headers.HeaderOps `json:"request,omitempty"`

	// Changes to what a client gets of a backend's answer, be it a 101 or a refusal;
	// only if the answer meets `require`, should that be set. The headers of the
	// handshake itself and those of framing stay as they are; `deferred` means
	// nothing here.
	// Default: none.
	Response *headers.RespHeaderOps `json:"response,omitempty"`

	// What backends get as Origin for a client that sends none, before `request` is
	// applied: `null`, or scheme, host and port. Placeholders work. A path is sent as
	// it is.
	// Default: no Origin.
	DefaultOrigin string `json:"default_origin,omitempty"`

	late *lateOps
}

// Provision checks the settings and prepares their use.
func (h *Headers) Provision(ctx caddy.Context) error {
	if h == nil {
		return nil
	}
	if err := provision(ctx, h.Request); err != nil {
		return fmt.Errorf("header_up: %w", err)
	}
	if h.Response != nil {
		if err := provision(ctx, h.Response.HeaderOps); err != nil {
			return fmt.Errorf("header_down: %w", err)
		}
	}
	if err := h.Check(); err != nil {
		return err
	}
	var err error
	if h.late, err = newLateOps(h.Request); err != nil {
		return fmt.Errorf("header_up: %w", err)
	}
	return nil
}

// Check refuses a default origin that is none. A path behind it does not matter:
// other proxies have allowed one.
func (h *Headers) Check() error {
	if h == nil || h.DefaultOrigin == "" || h.DefaultOrigin == opaqueOrigin || strings.Contains(h.DefaultOrigin, "{") {
		return nil
	}
	bare := h.DefaultOrigin
	if u, err := url.Parse(bare); err == nil {
		bare = strings.TrimSuffix(bare, u.RequestURI())
	}
	if _, err := parseOrigin(bare); err != nil || !httpguts.ValidHeaderFieldValue(h.DefaultOrigin) {
		return fmt.Errorf("default_origin: invalid origin %q", h.DefaultOrigin)
	}
	return nil
}

// ParseUp adds one header_up, whose name is the dispenser's current token.
// Syntax, which is that of reverse_proxy:
//
//	header_up [+|-]<field> [<value|regexp> [<replacement>]]
func (h *Headers) ParseUp(d *caddyfile.Dispenser) error {
	if h.Request == nil {
		h.Request = new(headers.HeaderOps)
	}
	args, err := parseOp(d, h.Request)
	if err != nil {
		return err
	}
	if remark := remarkUp(args); remark != "" {
		caddy.Log().Named("caddyfile").Warn(remark, zap.String("field", args[0]))
	}
	return nil
}

// ParseDown adds one header_down, likewise. Syntax:
//
//	header_down [+|-]<field> [<value|regexp> [<replacement>]]
func (h *Headers) ParseDown(d *caddyfile.Dispenser) error {
	if h.Response == nil {
		h.Response = &headers.RespHeaderOps{HeaderOps: new(headers.HeaderOps)}
	}
	_, err := parseOp(d, h.Response.HeaderOps)
	return err
}

// sameAsForwarded are the values of X-Forwarded-* that say what the proxy says
// anyway. They are those that reverse_proxy warns of.
var sameAsForwarded = map[string][]string{
	"X-Forwarded-For":   {"{remote}", "{http.request.remote}", "{remote_host}", "{http.request.remote.host}"},
	"X-Forwarded-Proto": {"{scheme}", "{http.request.scheme}"},
	"X-Forwarded-Host":  {"{host}", "{http.request.host}", "{hostport}", "{http.request.hostport}"},
}

// remarkUp returns what is to be said of a header_up that changes nothing, or nothing.
func remarkUp(args []string) string {
	field := http.CanonicalHeaderKey(strings.TrimLeft(args[0], "+-"))
	switch {
	case reserved(field) && field != "Host":
		return "header_up has no effect: the proxy sets this header itself"
	case len(args) == 2 && slices.Contains(sameAsForwarded[http.CanonicalHeaderKey(args[0])], args[1]):
		return "unnecessary header_up: this header is sent by default"
	default:
		return ""
	}
}

// parseOp adds the operation that the rest of the line says, and returns its
// arguments.
func parseOp(d *caddyfile.Dispenser, ops *headers.HeaderOps) ([]string, error) {
	name, args := d.Val(), d.RemainingArgs()
	var value string
	var replacement *string
	switch len(args) {
	case 0:
		return nil, d.Errf("%s: missing argument", name)
	case 1:
	case 2:
		value = args[1]
	case 3:
		value, replacement = args[1], &args[2]
	default:
		return nil, d.Errf("%s: surplus argument %q", name, args[3])
	}
	if err := headers.CaddyfileHeaderOp(ops, args[0], value, replacement); err != nil {
		return nil, d.Errf("%s: %w", name, err)
	}
	return args, nil
}

// provision prepares operations and checks what can be known before there is a
// request: who writes a header leaves out what is no header, silently.
func provision(ctx caddy.Context, ops *headers.HeaderOps) error {
	if ops == nil {
		return nil
	}
	if err := ops.Provision(ctx); err != nil {
		return err
	}
	if err := (headers.Handler{Request: ops}).Validate(); err != nil {
		return err
	}
	// A * stands for any text where a field is deleted or replaced, and may be part
	// of a name anyway.
	names := slices.Concat(ops.Delete, slices.Collect(maps.Keys(ops.Add)), slices.Collect(maps.Keys(ops.Set)), slices.Collect(maps.Keys(ops.Replace)))
	for _, name := range names {
		if !strings.Contains(name, "{") && !httpguts.ValidHeaderFieldName(name) {
			return fmt.Errorf("invalid field name %q", name)
		}
	}
	for _, fields := range []http.Header{ops.Add, ops.Set} {
		for name, values := range fields {
			for _, v := range values {
				if !httpguts.ValidHeaderFieldValue(v) {
					return fmt.Errorf("invalid value %q of %s", v, name)
				}
			}
		}
	}
	return nil
}
