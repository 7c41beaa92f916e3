// This file holds what of a backend's answer the client gets.

package handshake

import (
	"net/http"
	"net/textproto"
	"strings"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/headers"
)

// Down is what header_down does to the answers to one client. The zero value
// changes nothing.
type Down struct {
	ops  *headers.RespHeaderOps
	repl *caddy.Replacer
}

// Down returns the changes to the answers to r, which also learns, as from
// reverse_proxy, the placeholders of its upstream and of the answer. h may be nil.
func (h *Headers) Down(r *http.Request) Down {
	d := Down{repl: replacer(r)}
	if h != nil {
		d.ops = h.Response
	}
	return d
}

// AnswerHeader adds to h what the client's 101 carries: the backend's headers of
// this handshake, without those that concern one hop, as header_down changes them,
// and the proxy's own answer to the client's key.
func (p *Response) AnswerHeader(h http.Header, clientKey string, down Down) {
	theirs := p.HTTP.Header.Clone()
	stripHop(theirs)
	theirs["Upgrade"], theirs["Connection"] = []string{"websocket"}, []string{"Upgrade"}
	down.apply(p, theirs)
	for name := range theirs {
		if ofHandshake(name) {
			delete(theirs, name)
		}
	}
	CopyHeader(h, theirs)
	// The field's spelling, which some clients insist on.
	h["Upgrade"] = []string{"websocket"}
	h["Connection"] = []string{"Upgrade"}
	h["Sec-WebSocket-Accept"] = []string{AcceptKey(clientKey)} //nolint:canonicalheader // RFC 6455 §11.3
	if p.Subprotocol != "" {
		h["Sec-WebSocket-Protocol"] = []string{p.Subprotocol} //nolint:canonicalheader // RFC 6455 §11.3
	}
	if answer := p.Compression.Answer(); answer != "" {
		h["Sec-WebSocket-Extensions"] = []string{answer} //nolint:canonicalheader // RFC 6455 §11.3
	}
}

// RelayHeader adds to h what a response that is no 101 carries for the client, as
// header_down changes it. How long the body is remains what the backend said.
func (p *Response) RelayHeader(h http.Header, down Down) {
	theirs := p.HTTP.Header.Clone()
	length := theirs.Get("Content-Length")
	stripHop(theirs)
	down.apply(p, theirs)
	theirs.Del("Transfer-Encoding")
	theirs.Del("Content-Length")
	if length != "" {
		theirs.Set("Content-Length", length)
	}
	CopyHeader(h, theirs)
}

// CopyHeader adds src to dst. A Server or Date of src replaces that of dst.
func CopyHeader(dst, src http.Header) {
	for name, values := range src {
		if name == "Server" || name == "Date" {
			dst.Del(name)
		}
		dst[name] = append(dst[name], values...)
	}
}

// apply changes theirs, which is p's header without what concerns one hop.
func (d *Down) apply(p *Response, theirs http.Header) {
	if d.repl == nil {
		return
	}
	setUpstream(d.repl, &p.upstream)
	d.repl.Set(upstreamPrefix+"latency", p.latency)
	d.repl.Set(upstreamPrefix+"latency_ms", p.latency.Seconds()*1e3)
	const prefix = "http.reverse_proxy."
	d.repl.DeleteByPrefix(prefix + "header.")
	for name, values := range p.HTTP.Header {
		d.repl.Set(prefix+"header."+name, strings.Join(values, ","))
	}
	d.repl.Set(prefix+"status_code", p.HTTP.StatusCode)
	d.repl.Set(prefix+"status_text", p.HTTP.Status)
	if d.ops != nil && (d.ops.Require == nil || d.ops.Require.Match(p.HTTP.StatusCode, theirs)) {
		d.ops.ApplyTo(theirs, d.repl)
	}
}

// ofHandshake reports whether a header of a 101 is the proxy's own.
func ofHandshake(name string) bool {
	switch name = textproto.CanonicalMIMEHeaderKey(name); name {
	case "Upgrade", "Connection", "Content-Length", "Transfer-Encoding", "Trailer":
		return true
	default:
		return strings.HasPrefix(name, "Sec-Websocket-")
	}
}
