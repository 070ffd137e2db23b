-- What netprobe says of a packet in its comment, as fields: function, reason, stage, process and others. Filters: netprobe.reason,
-- netprobe.stage == "netfilter", netprobe.function contains "nf_". It reads captures of `netprobe extcap`, `skb -w`, `record` and `report`.

local stages = {
--STAGES--
}

local netprobe = Proto("netprobe", "netprobe")
local field = {
	func = ProtoField.string("netprobe.function", "Function"),
	reason = ProtoField.string("netprobe.reason", "Reason of the drop"),
	stage = ProtoField.string("netprobe.stage", "Stage"),
	detail = ProtoField.string("netprobe.detail", "Detail"),
	skb = ProtoField.uint64("netprobe.skb", "sk_buff", base.HEX),
	cpu = ProtoField.uint32("netprobe.cpu", "CPU"),
	process = ProtoField.string("netprobe.process", "Process"),
	pid = ProtoField.uint32("netprobe.pid", "PID"),
	packet = ProtoField.string("netprobe.packet", "Packet"),
	owner = ProtoField.string("netprobe.owner", "Owner of the socket"),
	netns = ProtoField.uint32("netprobe.netns", "Network namespace"),
	mark = ProtoField.uint32("netprobe.mark", "Mark", base.HEX),
	made_up = ProtoField.bool("netprobe.made_up", "Ethernet header made up"),
}
netprobe.fields = field

local comments = Field.new("frame.comment")

-- The value of a pattern at the end of the text, and the text before it.
local function cut(text, pattern)
	local at, _, first, second = text:find(pattern)
	if not at then return text end
	return text:sub(1, at - 1), first, second
end

-- The place: FUNCTION, FUNCTION(REASON), or REASON FUNCTION+0x12 for a drop; then what else is known.
local function place(text)
	local reason, rest = text:match("^([A-Z][A-Z0-9_]*) (.+)$")
	rest = rest or text
	local func, inner = rest:match("^([^%s%(%+]+)%(([A-Z][A-Z0-9_]*)%)")
	func = func or rest:match("^([^%s%(%+%[]+)") or rest
	return func, reason or inner, rest:match("^%S+%s+(.+)$")
end

local function show(tree, text)
	local rest, made_up = cut(text, " (%(made%-up Ethernet header%))$")
	local mark, netns, owner, packet
	rest, netns, mark = cut(rest, " netns (%d+) mark (0x%x+)$")
	rest, owner = cut(rest, " owner (%S+:%d+)$")
	rest, packet = cut(rest, " packet (%S+)$")
	local where, skb, cpu, process, pid = rest:match("^(.-) skb (0x%x+) cpu (%d+) (.-):(%d+)$")
	if not where then return end
	local func, reason, detail = place(where)
	local branch = tree:add(netprobe)
	branch:append_text(": " .. where)
	branch:add(field.func, func)
	if reason then branch:add(field.reason, reason) end
	local stage = stages[func]
	if stage then branch:add(field.stage, stage) end
	if detail then branch:add(field.detail, detail) end
	branch:add(field.skb, UInt64.fromhex(skb:sub(3)))
	branch:add(field.cpu, tonumber(cpu))
	branch:add(field.process, process)
	branch:add(field.pid, tonumber(pid))
	if packet then branch:add(field.packet, packet) end
	if owner then branch:add(field.owner, owner) end
	if netns then branch:add(field.netns, tonumber(netns)) end
	if mark then branch:add(field.mark, tonumber(mark)) end
	if made_up then branch:add(field.made_up, true) end
end

function netprobe.dissector(_, _, tree)
	for _, comment in ipairs({ comments() }) do
		show(tree, tostring(comment))
	end
end

register_postdissector(netprobe)
