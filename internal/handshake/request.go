package handshake

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/textproto"
	"slices"
	"strings"

	"golang.org/x/net/http/httpguts"

	"github.com/holdfast-proxy/caddy-holdfast/internal/deflate"
)

// IDHeader carries the connection's id to the backend.
const IDHeader = "Holdfast-Connection"

// Request is what goes to backends for one client: its request line and headers
// in wire form, without what differs at every dial. It holds nothing of the
// http.Request that it was made from.
type Request struct {
	head         []byte
	subprotocols []string
	offer        deflate.Negotiation
	resume       string
}

// hopHeaders are the headers that concern one hop, besides those that the
// Connection header names (RFC 9110 §7.6.1), as reverse_proxy has them.
var hopHeaders = []string{
	"Alt-Svc", "Connection", "Proxy-Connection", "Keep-Alive", "Proxy-Authenticate",
	"Proxy-Authorization", "Te", "Trailer", "Transfer-Encoding", "Upgrade", "Content-Length",
}

// dialHeaders are written anew for every dial.
var dialHeaders = []string{"Sec-Websocket-Key", "Sec-Websocket-Version", "Sec-Websocket-Extensions", "Host"}

// wireNames are the names of RFC 6455 §11.3, which net/http spells otherwise.
var wireNames = map[string]string{
	"Sec-Websocket-Protocol":   "Sec-WebSocket-Protocol",
	"Sec-Websocket-Extensions": "Sec-WebSocket-Extensions",
}

// NewRequest makes the request for the backends from r, which passed Check. id
// names the connection; trusted says that r comes from a trusted proxy, whose
// X-Forwarded-* headers are continued. A host or a target that would break out of
// its line is an error: the server that received r refuses them, but a handler may
// have made them of what the client sent.
func NewRequest(r *http.Request, id string, trusted bool, offer deflate.Negotiation) (*Request, error) {
	target := r.URL.RequestURI()
	if strings.ContainsFunc(target, func(c rune) bool { return c <= ' ' || c == 0x7f }) {
		return nil, fmt.Errorf("invalid request target %q", target)
	}
	if !httpguts.ValidHostHeader(r.Host) {
		return nil, fmt.Errorf("invalid host %q", r.Host)
	}
	h := r.Header.Clone()
	stripHop(h)
	for _, name := range dialHeaders {
		h.Del(name)
	}
	for name := range h {
		if ownHeader(name) {
			delete(h, name)
		}
	}
	forwarded(h, r, trusted)
	h[IDHeader] = []string{id}

	var b bytes.Buffer
	b.WriteString("GET " + target + " HTTP/1.1\r\nHost: " + r.Host + "\r\n")
	writeHeader(&b, h)
	return &Request{
		head:         bytes.Clone(b.Bytes()),
		subprotocols: tokens(h["Sec-Websocket-Protocol"]),
		offer:        offer,
	}, nil
}

// ownHeader reports whether a header's name is one of ours, also as CGI and its
// kin would read it, which turn both - and _ into _.
func ownHeader(name string) bool {
	const prefix = "holdfast-"
	return len(name) >= len(prefix) && strings.EqualFold(strings.ReplaceAll(name[:len(prefix)], "_", "-"), prefix)
}

// ResumeHeader tells a backend that it takes a connection over, and why.
const ResumeHeader = "Holdfast-Resume"

// Redial returns the request for a backend that comes after the first one, from
// which the client was told of the compression. resume is the value of ResumeHeader.
func (q *Request) Redial(told deflate.Agreement, resume string) *Request {
	return &Request{head: q.head, subprotocols: q.subprotocols, offer: told.Redial(), resume: resume}
}

// HTTP returns the request as a server would have it, for what chooses a backend
// by it.
func (q *Request) HTTP() (*http.Request, error) {
	return http.ReadRequest(bufio.NewReader(io.MultiReader(bytes.NewReader(q.head), strings.NewReader("\r\n"))))
}

// wire returns the request as it goes to a backend with the given key.
func (q *Request) wire(key string) []byte {
	var b bytes.Buffer
	b.Write(q.head)
	if q.resume != "" {
		b.WriteString(ResumeHeader + ": " + q.resume + "\r\n")
	}
	b.WriteString("Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: " + key + "\r\n")
	if offer := q.offer.Offer(); offer != "" {
		b.WriteString("Sec-WebSocket-Extensions: " + offer + "\r\n")
	}
	b.WriteString("\r\n")
	return b.Bytes()
}

// stripHop removes what concerns one hop only.
func stripHop(h http.Header) {
	for _, list := range h["Connection"] {
		for name := range strings.SplitSeq(list, ",") {
			h.Del(textproto.TrimString(name))
		}
	}
	for _, name := range hopHeaders {
		h.Del(name)
	}
}

// forwarded sets the X-Forwarded-* headers as reverse_proxy does: what an
// untrusted client sent is replaced, what a trusted proxy sent is continued.
func forwarded(h http.Header, r *http.Request, trusted bool) {
	ip, _, err := net.SplitHostPort(r.RemoteAddr)
	if err != nil {
		// A Unix socket has no address. Only a trusted peer may then speak for others.
		if !trusted {
			for _, name := range []string{"X-Forwarded-For", "X-Forwarded-Proto", "X-Forwarded-Host"} {
				h.Del(name)
			}
			return
		}
		ip = ""
	}
	ip, _, _ = strings.Cut(ip, "%") // the zone of an IPv6 address

	if prior := strings.Join(h["X-Forwarded-For"], ", "); trusted && prior != "" {
		if ip != "" {
			prior += ", " + ip
		}
		h.Set("X-Forwarded-For", prior)
	} else if ip != "" {
		h.Set("X-Forwarded-For", ip)
	}
	proto := "http"
	if r.TLS != nil {
		proto = "https"
	}
	for name, own := range map[string]string{"X-Forwarded-Proto": proto, "X-Forwarded-Host": r.Host} {
		if prior := h[name]; trusted && len(prior) > 0 && prior[len(prior)-1] != "" {
			own = prior[len(prior)-1]
		}
		h.Set(name, own)
	}
}

// writeHeader writes h in a stable order, with the field's own spelling. Values
// that could break out of a header line, which net/http has refused already and
// another handler may have set, are left out.
func writeHeader(b *bytes.Buffer, h http.Header) {
	names := make([]string, 0, len(h))
	for name := range h {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		spelled := name
		if s, ok := wireNames[name]; ok {
			spelled = s
		}
		if !httpguts.ValidHeaderFieldName(name) {
			continue
		}
		for _, v := range h[name] {
			if httpguts.ValidHeaderFieldValue(v) {
				b.WriteString(spelled + ": " + v + "\r\n")
			}
		}
	}
}

// tokens splits comma-separated header values.
func tokens(values []string) []string {
	var out []string
	for _, v := range values {
		for t := range strings.SplitSeq(v, ",") {
			if t = textproto.TrimString(t); t != "" {
				out = append(out, t)
			}
		}
	}
	return out
}
